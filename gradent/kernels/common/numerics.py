"""The reductions in plain torch: wide accumulation, tiles inside the budget.

A result is always `[3]` float64 on the operands' device: `(‖G_w‖², ‖G_l‖², ⟨G_w, G_l⟩)`. Tiles are accumulated in
float32 (float64 for float64 operands), in runs of `RUN` products, and the runs' sums are added in float64: one long
float32 dot product loses four digits at the size of a weight matrix, runs of 16k lose none that matter.

Letters: T tokens, O and I the two sides of a weight, K entries of a flattened tile.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gradent.kernels.common.cost import Plan, batch_scratch, choose, tile_room
from gradent.kernels.common.precision import exactly
from gradent.kernels.crossover import price

__all__ = [
    "accumulator",
    "batch_pays",
    "in_memory_order",
    "product_pays",
    "products",
    "products_fit",
    "put_product",
    "reduce_batch",
    "reduce_dense",
    "reduce_flat",
    "reduce_planned",
    "reduce_tiles",
    "row_products",
    "spans",
    "tiles_pay",
]

RUN = 16384

NARROW = 128
"""Columns of a factor below which a CPU's library wants it first: beside 2,048 columns it multiplies 16 in half the
time so, and 8 in a third. From here on, the order does not matter."""

BLOCK = 128
"""Runs whose sums are held at once."""

SMALL = 4 * 2**20
"""Bytes of scratch up to which a CPU takes all rows of a batch at once: calls cost more than sums there. Beyond, one
buffer that is used again for every pair stays in the caches."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` operands are formed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@exactly
def reduce_flat(tile: Tensor) -> Tensor:
    """Gram entries of the two rows of a tile.

    Args:
        tile: `[2, K]`, row 0 chosen, row 1 rejected, float32 or float64.

    Returns:
        `[3]` float64: `(x·x, y·y, x·y)`.
    """
    whole = tile.shape[1] // RUN * RUN
    entries = torch.zeros(2, 2, dtype=torch.float64, device=tile.device)
    if whole:
        runs = tile[:, :whole].reshape(2, -1, RUN).transpose(0, 1)
        for span in spans(len(runs), BLOCK):  # a large tile has so many sums that they would count
            entries += (runs[span] @ runs[span].mT).double().sum(0)
    if whole < tile.shape[1]:
        rest = tile[:, whole:]
        entries += (rest @ rest.mT).double()
    return torch.stack((entries[0, 0], entries[1, 1], entries[0, 1]))


def batch_pays(u: Tensor, v: Tensor, *, budget: int) -> bool:
    """Whether `reduce_batch` is the way: the outer form is the cheaper one, and its products are small.

    Beyond that `reduce_dense`, pair by pair in one buffer, is faster, or the only way inside the budget.

    Args:
        u: `[2k, T, O]`.
        v: `[2k, T, I]`.
        budget: bytes of scratch.

    Returns:
        The answer.
    """
    wide = accumulator(u.dtype)
    (count, length, rows), cols = u.shape, v.shape[2]
    if count == 0 or not products_fit(u, v, count, budget):
        return False
    dearer = partial(price, u.device, u.dtype, path="torch", budget=budget)
    plan = choose(length, length, rows, cols, itemsize=wide.itemsize, budget=budget, price=dearer)
    return plan.form == "outer"


def product_pays(u: Tensor, v: Tensor, *, count: int, budget: int) -> bool:
    """Whether rows' products are best formed as they come: they are smaller than their factors, and few.

    Smaller than its factors, a product is the cheaper form as well, and it is all that has to be kept of them.

    Args:
        u: `[R, T, O]`.
        v: `[R, T, I]`.
        count: rows whose products are held until they are reduced.
        budget: bytes of scratch.

    Returns:
        The answer.
    """
    (_, length, rows), cols = u.shape, v.shape[2]
    factors = length * (rows * u.element_size() + cols * v.element_size())
    return rows * cols * accumulator(u.dtype).itemsize <= factors and products_fit(u, v, count, budget)


def tiles_pay(grad: Tensor, *, count: int, budget: int) -> bool:
    """Whether `reduce_tiles` is the way for gradients that were formed already: copies of all of them are small.

    Args:
        grad: one of them.
        count: how many there are.
        budget: bytes of scratch.

    Returns:
        The answer.
    """
    size = batch_scratch(count, 0, grad.numel(), 1, itemsize=accumulator(grad.dtype).itemsize)
    return size <= _room(grad.device, budget)


def products_fit(u: Tensor, v: Tensor, count: int, budget: int) -> bool:
    """Whether the products of rows, and what it takes to form and reduce them, are small.

    Args:
        u: `[R, T, O]`.
        v: `[R, T, I]`.
        count: rows whose products are held at once.
        budget: bytes of scratch.

    Returns:
        The answer.
    """
    wide = accumulator(u.dtype)
    widen = (u.dtype != wide, v.dtype != wide)
    size = batch_scratch(count, u.shape[1], u.shape[2], v.shape[2], itemsize=wide.itemsize, widen=widen)
    return size <= _room(u.device, budget)


def _room(device: torch.device, budget: int) -> int:
    room = tile_room(budget)
    return min(room, SMALL) if device.type == "cpu" else room


@exactly
def products(u: Tensor, v: Tensor) -> Tensor:
    """The gradient of every row.

    Args:
        u: `[R, T, O]`.
        v: `[R, T, I]`.

    Returns:
        `uᵀ v` of each row, `[R, O, I]`, in the accumulator's dtype.
    """
    wide = accumulator(torch.promote_types(u.dtype, v.dtype))
    u, v = u.to(wide), v.to(wide)
    return torch.mm(u[0].T, v[0])[None] if len(u) == 1 else torch.bmm(u.mT, v)


@exactly
def row_products(u: Tensor, v: Tensor) -> Tensor:
    """`products`, laid out as they are formed fastest: where v is the narrower, a view of `vᵀ u` (`NARROW`).

    Args:
        u: `[R, T, O]`.
        v: `[R, T, I]`.

    Returns:
        `[R, O, I]`, in the accumulator's dtype.
    """
    return products(v, u).mT if _turned(u, v) else products(u, v)


def _turned(u: Tensor, v: Tensor) -> bool:
    """Whether `vᵀ u` is formed faster than `uᵀ v`; by the features of `[..., O]` and `[..., I]`."""
    return v.shape[-1] < min(NARROW, u.shape[-1])


def in_memory_order(grads: Tensor) -> Tensor:
    """The numbers of each row's gradient, `[R, O * I]`, in the order in which they lie: without a copy where it can be.

    Args:
        grads: `[R, ...]`; of matrices, `row_products` gives some that lie column by column.

    Returns:
        `[R, numbers]`.
    """
    if grads.dim() == 3 and not grads.is_contiguous() and grads.mT.is_contiguous():
        grads = grads.mT
    return grads.reshape(len(grads), grads[0].numel())


@exactly
def reduce_batch(u: Tensor, v: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Gram entries of k pairs at once: the outer form of all their rows in one batched product.

    Args:
        u: `[2k, T, O]`, rows 0..k-1 chosen and k..2k-1 rejected, any float dtype.
        v: `[2k, T, I]`.
        weight: as in `reduce_dense`.

    Returns:
        `[k, 3]` float64.
    """
    grads = row_products(u, v)
    if weight is not None:
        grads *= weight
    return reduce_tiles(in_memory_order(grads))


@exactly
def reduce_tiles(grads: Tensor) -> Tensor:
    """Gram entries of k pairs of gradients.

    Args:
        grads: `[2k, ...]`, rows 0..k-1 chosen and k..2k-1 rejected, float32 or float64.

    Returns:
        `[k, 3]` float64.
    """
    tiles = grads.reshape(2, len(grads) // 2, -1).transpose(0, 1)
    numbers = tiles.shape[2]
    if numbers > RUN and numbers % RUN and len(tiles):  # runs of several pairs are no view: the product would copy them
        return torch.stack([reduce_flat(tile) for tile in tiles])
    run = min(RUN, max(1, numbers))
    runs = tiles.reshape(len(tiles), 2, numbers // run, run).transpose(1, 2)
    grams = (runs @ runs.mT).double().sum(1)
    return torch.stack((grams[:, 0, 0], grams[:, 1, 1], grams[:, 0, 1]), 1)


def reduce_dense(
    u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, *, budget: int, weight: Tensor | None = None
) -> Tensor:
    """Gram entries of `G_w = u_wᵀ v_w` and `G_l = u_lᵀ v_l`, neither of which is ever held whole.

    Args:
        u_w: `[T_w, O]`, any float dtype.
        v_w: `[T_w, I]`.
        u_l: `[T_l, O]`.
        v_l: `[T_l, I]`.
        budget: bytes that the tiles may take.
        weight: `[O, I]` or None; square root of the metric's diagonal, which multiplies every entry of G.

    Returns:
        `[3]` float64.

    Raises:
        MemoryBudgetError: not even one row of a tile fits.
    """
    alike = accumulator(u_w.dtype) == accumulator(v_w.dtype)
    if alike and _turned(u_w, v_w):  # the entries of Gᵀ are those of G
        u_w, v_w, u_l, v_l = v_w, u_w, v_l, u_l
        weight = None if weight is None else weight.mT
    wide = accumulator(u_w.dtype)
    plan = choose(
        u_w.shape[0],
        u_l.shape[0],
        u_w.shape[1],
        v_w.shape[1],
        itemsize=wide.itemsize,
        budget=budget,
        widen=u_w.dtype != wide or v_w.dtype != wide,
        weighted=weight is not None,
        price=partial(price, u_w.device, u_w.dtype, path="torch", budget=budget),
    )
    return reduce_planned(u_w, v_w, u_l, v_l, plan, weight)


@exactly
def reduce_planned(
    u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, plan: Plan, weight: Tensor | None = None
) -> Tensor:
    """`reduce_dense` along a given plan; `weight` goes with the outer form alone."""
    if plan.form == "outer":
        return _outer(u_w, v_w, u_l, v_l, plan, weight)
    pairs = ((u_w, v_w, u_w, v_w), (u_l, v_l, u_l, v_l), (u_w, v_w, u_l, v_l))
    return torch.stack([_gram(*operands, plan) for operands in pairs])


def _outer(u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, plan: Plan, weight: Tensor | None) -> Tensor:
    rows, cols = u_w.shape[1], v_w.shape[1]
    buffer = torch.empty(2 * plan.tile[0] * plan.tile[1], dtype=accumulator(u_w.dtype), device=v_w.device)
    entries = torch.zeros(3, dtype=torch.float64, device=v_w.device)
    for top in spans(rows, plan.tile[0]):
        for left in spans(cols, plan.tile[1]):
            height, width = top.stop - top.start, left.stop - left.start
            part = buffer[: 2 * height * width].view(2, height, width)
            put_product(u_w[:, top], v_w[:, left], plan.depth, part[0])
            put_product(u_l[:, top], v_l[:, left], plan.depth, part[1])
            if weight is not None:
                part *= weight[top, left]
            entries += reduce_flat(part.view(2, -1))
    return entries


def _gram(u: Tensor, v: Tensor, x: Tensor, y: Tensor, plan: Plan) -> Tensor:
    """`Σ_{t,s} (u_t·x_s)(v_t·y_s)`, float64 scalar; of a product with itself, half of the tiles are formed."""
    wide = accumulator(u.dtype)
    if u.shape[0] <= plan.tile[0] and x.shape[0] <= plan.tile[1] and u.dtype == v.dtype == x.dtype == y.dtype == wide:
        return _sum(torch.mm(u, x.T).mul_(torch.mm(v, y.T)))  # one tile: short rows are many, and calls cost
    buffer = torch.empty(2 * plan.tile[0] * plan.tile[1], dtype=accumulator(u.dtype), device=u.device)
    total = torch.zeros((), dtype=torch.float64, device=u.device)
    same = u is x and v is y and plan.tile[0] == plan.tile[1]
    for top in spans(u.shape[0], plan.tile[0]):
        for left in spans(x.shape[0], plan.tile[1]):
            if same and left.start > top.start:
                continue  # its mirror image counts twice
            height, width = top.stop - top.start, left.stop - left.start
            part = buffer[: 2 * height * width].view(2, height, width)
            put_product(u[top].T, x[left].T, plan.depth, part[0])
            put_product(v[top].T, y[left].T, plan.depth, part[1])
            part[0] *= part[1]
            total += _sum(part[0]) * (2 if same and left.start < top.start else 1)
    return total


def put_product(left: Tensor, right: Tensor, depth: int, out: Tensor, *, scale: float = 1.0) -> None:
    """`out = scale · leftᵀ right`, wide.

    Args:
        left: `[K, rows]`, any float dtype.
        right: `[K, cols]`.
        depth: how many of the K are widened at once, where they are narrower than `out`.
        out: `[rows, cols]`, overwritten.
        scale: a factor.
    """
    if left.dtype == right.dtype == out.dtype:
        if scale == 1:
            torch.mm(left.T, right, out=out)
        else:
            torch.addmm(out, left.T, right, beta=0, alpha=scale, out=out)
        return
    out.zero_()
    for span in spans(left.shape[0], depth):
        out.addmm_(left[span].to(out.dtype).T, right[span].to(out.dtype), alpha=scale)


def spans(count: int, step: int) -> list[slice]:
    """`range(count)` in slices of `step`, the last one what is left."""
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]


def _sum(values: Tensor) -> Tensor:
    """Sum of all entries, float64: float32 along the last axis (a row of T products), float64 across."""
    return values.sum(-1).sum(dtype=torch.float64)
