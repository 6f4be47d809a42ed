"""Products in plain torch: wide accumulation, in runs and tiles.

Products are accumulated in float32 (float64 for float64 operands), in runs of `RUN`, and the runs' sums are added in
float64: one long float32 dot product loses four digits at the size of a weight matrix, runs of 16k lose none that
matter.

Letters: R or N rows, T tokens, O and I the two sides of a weight, K numbers of a flattened gradient or of a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradent.kernels.common.precision import exactly
from gradent.kernels.common.wanted import Wanted, pick

__all__ = [
    "RUN",
    "Factors",
    "accumulator",
    "dots",
    "in_memory_order",
    "is_turned",
    "products",
    "put_product",
    "reduce_flat",
    "reduce_stacked",
    "reduce_tiles",
    "row_products",
    "spans",
]

RUN = 16384

NARROW = 128
"""Columns of a factor below which a CPU's library wants it first: beside 2,048 columns it multiplies 16 in half the
time so, and 8 in a third. From here on, the order does not matter."""

BLOCK = 128
"""Runs whose sums are held at once."""


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which products of such operands are formed: float64 where one is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def spans(count: int, step: int) -> list[slice]:
    """`range(count)` in slices of `step`, the last one what is left."""
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]


@exactly
def dots(left: Tensor, right: Tensor) -> Tensor:
    """`left rightᵀ` of `[a, K]` and `[b, K]`, float32 or float64: float64 `[a, b]`, in runs."""
    numbers = left.shape[1]
    even = numbers // RUN * RUN
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    if even:
        parts = [part[:, :even].reshape(len(part), -1, RUN).transpose(0, 1) for part in (left, right)]
        for span in spans(even // RUN, BLOCK):  # a large tile has so many sums that they would count
            total += (parts[0][span] @ parts[1][span].mT).double().sum(0)
    if even < numbers:
        total += (left[:, even:] @ right[:, even:].T).double()
    return total


def reduce_flat(tile: Tensor, rows: int | None = None) -> Tensor:
    """A group's entries `[m]` from a tile `[n + D, K]`, wide, of n rows (all by default) and D directions."""
    rows = len(tile) if rows is None else rows
    return pick(dots(tile, tile[:rows]), rows)


@exactly
def reduce_tiles(grads: Tensor, wanted: Wanted, directions: Tensor | None = None) -> Tensor:
    """Entries `[M]` from the gradients of all rows, `[N, ...]` float32 or float64, and directions `[D, ...]`."""
    flat, along = in_memory_order(grads, directions)
    entries = reduce_stacked(flat[:, None], wanted)[0]
    return entries if along is None else wanted.joined(entries, dots(flat, along))


@exactly
def reduce_stacked(stack: Tensor, wanted: Wanted) -> Tensor:
    """Products among rows alone, `[P, M]` float64, of P parameters whose gradients lie side by side, `[N, P, K]`."""
    _, count, numbers = stack.shape
    if wanted.is_even:
        size, groups = wanted.largest, len(wanted.groups)
        tiles = stack.reshape(size, groups * count, numbers).transpose(0, 1)
        return pick(_grams(tiles), size).view(groups, count, -1).transpose(0, 1).flatten(1)
    parts = [pick(_grams(stack[list(group)].transpose(0, 1)), len(group)) for group in wanted.groups]
    return torch.cat(parts, 1) if parts else torch.zeros(count, 0, dtype=torch.float64, device=stack.device)


def _grams(tiles: Tensor) -> Tensor:
    """Products of the rows of each of B tiles `[B, n, K]`, float64 `[B, n, n]`."""
    count, rows, numbers = tiles.shape
    if numbers > RUN and numbers % RUN and count:  # runs of several tiles are no view: the product would copy them
        return torch.stack([dots(tile, tile) for tile in tiles])
    run = min(RUN, max(1, numbers))
    runs = tiles.reshape(count, rows, numbers // run, run).transpose(1, 2)
    return (runs @ runs.mT).double().sum(1)


def in_memory_order(grads: Tensor, directions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Numbers of gradients `[R, K]` and of directions `[D, K]` in one order, in which the gradients lie if they can."""
    if grads.dim() == 3 and not grads.is_contiguous() and grads.mT.is_contiguous():
        grads, directions = grads.mT, None if directions is None else directions.mT
    flat = grads.reshape(len(grads), grads[0].numel() if len(grads) else 0)
    return flat, None if directions is None else directions.reshape(len(directions), -1).to(grads.dtype)


@exactly
def products(u: Tensor, v: Tensor) -> Tensor:
    """Every row's gradient `uᵀ v`, `[R, O, I]` wide, from u `[R, T, O]` and v `[R, T, I]`."""
    wide = accumulator(u.dtype, v.dtype)
    u, v = u.to(wide), v.to(wide)
    return torch.mm(u[0].T, v[0])[None] if len(u) == 1 else torch.bmm(u.mT, v)


@exactly
def row_products(u: Tensor, v: Tensor) -> Tensor:
    """`products`, laid out as they are formed fastest: where v is the narrower, a view of `vᵀ u` (`NARROW`)."""
    return products(v, u).mT if is_turned(u, v) else products(u, v)


def is_turned(u: Tensor, v: Tensor) -> bool:
    """Whether `vᵀ u` is formed faster than `uᵀ v`, by the features of `[..., O]` and `[..., I]`."""
    return v.shape[-1] < min(NARROW, u.shape[-1])


def put_product(left: Tensor, right: Tensor, depth: int, out: Tensor, *, scale: float = 1.0) -> None:
    """`out = scale · leftᵀ right`, wide, of `[K, rows]` and `[K, cols]`; `depth` of the K are widened at once."""
    if left.dtype == right.dtype == out.dtype:
        if scale == 1:
            torch.mm(left.T, right, out=out)
        else:
            torch.addmm(out, left.T, right, beta=0, alpha=scale, out=out)
        return
    out.zero_()
    for span in spans(left.shape[0], depth):
        out.addmm_(left[span].to(out.dtype).T, right[span].to(out.dtype), alpha=scale)


Factors = Sequence[tuple[Tensor, Tensor]]
"""`(u [T_i, O], v [T_i, I])` of each row of a group."""
