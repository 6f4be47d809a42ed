"""Statistics inside the weight gradient: every row's product is formed once, for its group's entries and for the sum.

A backward pass multiplies `Σ_t u_t v_tᵀ` over all rows of a batch to have a weight's gradient. Formed row by row, the
same products give each group's Gram entries as well, so that these cost no further matrix product.

Letters: N rows of which products are wanted, R rows of the forward, T tokens, O and I the two sides of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gradent.kernels.availability import announce_budget, attempt, on_kernels
from gradent.kernels.common.budget import batch_room, tile_room
from gradent.kernels.common.cost import DEPTH, batch_scratch, can_wait
from gradent.kernels.common.numerics import accumulator, put_product, reduce_flat, reduce_tiles, row_products, spans
from gradent.kernels.common.precision import exactly
from gradent.kernels.common.streams import sent
from gradent.kernels.common.wanted import Wanted

__all__ = ["reduce_with_sum"]

TILE = 2**22
"""Bytes of one group's tiles at most: near enough to the caches, and long enough for a product to run at speed."""

Groups = Sequence[Sequence[int | None]]
"""Rows of the forward in each group, None for one that is not here; then each row that is in no group."""


@exactly
def reduce_with_sum(
    u: Tensor,
    v: Tensor,
    places: Sequence[int],
    factors: Sequence[float],
    *,
    wanted: Wanted,
    budget: int,
    weight: Tensor | None = None,
    look: Callable[[], Sequence[tuple[int, int]] | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`(entries [M] float64, sum [O, I] wide)` of the gradients of u `[R, T, O]` and v `[R, T, I]`.

    `places` are the rows' numbers among the N, or -1; `factors` multiply a row in the entries (by a power of two near
    the factor before anything is squared, for a loss's weight can be so small that squares would vanish) and not in the
    sum, which the row enters once. `weight` `[O, I]` multiplies a gradient in the entries alone; `look` finds of each
    row the tokens outside of which u or v is zero. The sum comes on top of the budget.
    """
    powers, groups = _powers(factors), _groups(places, wanted)
    if on_kernels(u, v) and wanted == Wanted.pairs(len(wanted.groups)):
        reduced = attempt(u.device, partial(_by_kernel, u, v, places, factors, wanted, weight, budget))
        if reduced is not None:
            return reduced
    rest = sent(_rest(factors, powers, places, wanted), u.device)
    (count, length, out), inp, wide = u.shape, v.shape[2], accumulator(u.dtype, v.dtype)
    widen = (u.dtype != wide, v.dtype != wide)
    at_once = batch_scratch(count, length, out, inp, itemsize=wide.itemsize, widen=widen)
    if sorted(places) == list(range(wanted.rows)) and at_once <= batch_room(budget, u.device.type):
        entries, total = _together(u, v, places, powers, wanted, weight)
        return entries * rest, total
    row_spans = None if look is None else look()
    held = max(2, wanted.largest)
    room = min(tile_room(budget), held * TILE // 2) // wide.itemsize
    widened = DEPTH if any(widen) else 0  # numbers of a copy for each row and column of a tile
    width = min(inp, max(1, room // (2 * held * max(widened, 1))))
    height = max(1, min(out, (room - widened * width) // (held * width + widened)))
    buffer = torch.empty(held * height * width, dtype=wide, device=u.device)
    total = torch.zeros(out, inp, dtype=wide, device=u.device)
    parts = [torch.zeros(wanted.count(group), dtype=torch.float64, device=u.device) for group in wanted.groups]
    for top in spans(out, height):
        for left in spans(inp, width):
            goal = total[top, left]
            for number, group in enumerate(groups):
                tile = buffer[: len(group) * goal.numel()].view(len(group), *goal.shape)
                for side, row in zip(tile, group, strict=True):
                    if row is None:
                        side.zero_()
                        continue
                    live = slice(*row_spans[row]) if row_spans is not None else slice(None)
                    put_product(u[row, live, top], v[row, live, left], DEPTH, side, scale=powers[row])
                    goal.add_(side, alpha=1 / powers[row])
                if number < len(parts):
                    if weight is not None:
                        tile *= weight[top, left]
                    parts[number] += reduce_flat(tile.view(len(group), -1))
    return (torch.cat(parts) if parts else rest) * rest, total


def _together(
    u: Tensor, v: Tensor, places: Sequence[int], powers: Sequence[float], wanted: Wanted, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same with all rows' gradients held at once, as they are small. Every row belongs to a group."""
    grads = row_products(u, v)
    total = grads.sum(0).contiguous()
    if any(power != 1 for power in powers):
        grads *= sent(torch.tensor(powers, dtype=grads.dtype), grads.device)[:, None, None]
    if weight is not None:
        grads *= weight
    if list(places) != list(range(len(places))):
        grads = grads[sent(torch.tensor(places).argsort(), grads.device)]
    return reduce_tiles(grads, wanted), total


def _groups(places: Sequence[int], wanted: Wanted) -> Groups:
    at = {place: row for row, place in enumerate(places) if place >= 0}
    alone = [row for row, place in enumerate(places) if place < 0]
    groups: list[list[int | None]] = [[at.get(place) for place in group] for group in wanted.groups]
    return groups + [[row] for row in alone]


def _powers(factors: Sequence[float]) -> list[float]:
    """Powers of two near the factors, within what float32 can divide by; 1 for those that can wait."""
    return [
        1.0 if not factor or can_wait(factor) else 2.0 ** min(120, max(-120, math.frexp(factor)[1]))
        for factor in factors
    ]


def _rest(factors: Sequence[float], powers: Sequence[float], places: Sequence[int], wanted: Wanted) -> Tensor:
    """What is left of the factors in each entry, float64 `[M]`."""
    left = torch.zeros(wanted.rows, dtype=torch.float64)
    for factor, power, place in zip(factors, powers, places, strict=True):
        if place >= 0:
            left[place] = factor / power
    first, second = wanted.places
    return left[first] * left[second]


def _by_kernel(
    u: Tensor,
    v: Tensor,
    places: Sequence[int],
    factors: Sequence[float],
    wanted: Wanted,
    weight: Tensor | None,
    budget: int,
) -> tuple[Tensor, Tensor] | None:
    """The same of pairs by the kernel that stores the sum; None, and announced, if it is over the budget."""
    from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415  (imports Triton)
    from gradent.kernels.outer.triton import outer_scratch, outer_with_gradient  # noqa: PLC0415  (imports Triton)

    count, tokens, _ = u.shape
    powers, pairs = _powers(factors), len(wanted.groups)
    # A side without a row gets an empty span, and a share of 0.
    couples = [(*group, None)[:2] for group in _groups(places, wanted)]
    sides = [[count if row is None else row for row in side] for side in zip(*couples, strict=True)]
    starts = [[min(row, count - 1) * tokens for row in side] for side in sides]
    lengths = [[tokens if row < count else 0 for row in side] for side in sides]
    where = Spans(starts[0], lengths[0], starts[1], lengths[1])
    flat_u, flat_v = u.flatten(0, 1), v.flatten(0, 1)
    # A power of two rounds nothing, but the range of float16 is too small for it.
    kept, is_moved = torch.float32 if u.dtype == torch.float16 else u.dtype, any(power != 1 for power in powers)
    needed = outer_scratch(flat_u, flat_v, flat_u, flat_v, where, store=True) + is_moved * u.numel() * kept.itemsize
    if needed > budget:
        announce_budget(u.device, needed, budget)
        return None
    if is_moved:
        flat_u = (u * sent(torch.tensor(powers, dtype=kept), u.device)[:, None, None]).flatten(0, 1)
    shares = torch.tensor([*(1 / power for power in powers), 0.0])
    coefficients = torch.stack([shares[side] for side in sides], 1)
    entries, total = outer_with_gradient(flat_u, flat_v, flat_u, flat_v, where, coefficients, weight)
    return entries[:pairs].flatten() * sent(_rest(factors, powers, places, wanted), entries.device), total
