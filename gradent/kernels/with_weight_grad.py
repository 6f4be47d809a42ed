"""Statistics inside the weight gradient: every row's product is formed once, for its pair's entries and for the sum.

A backward pass multiplies `Σ_t u_t v_tᵀ` over all rows of a batch to have a weight's gradient. Formed row by row, the
same products give each pair's Gram entries as well, so that these cost no further matrix product.

Letters: k pairs, R rows, T tokens, O and I the two sides of a weight `[O, I]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gradent.kernels.common.cost import DEPTH, can_wait, tile_room
from gradent.kernels.common.numerics import (
    accumulator,
    in_memory_order,
    products_fit,
    put_product,
    reduce_flat,
    reduce_tiles,
    row_products,
    spans,
)
from gradent.kernels.common.precision import exactly
from gradent.kernels.common.streams import sent
from gradent.kernels.dispatch import announce_budget, attempt, on_kernels

__all__ = ["reduce_shared"]

TILE = 2**22
"""Bytes of one pair's two tiles at most: near enough to the caches, and long enough for a product to run at speed."""


@exactly
def reduce_shared(
    u: Tensor,
    v: Tensor,
    places: Sequence[int],
    factors: Sequence[float],
    *,
    pairs: int,
    budget: int,
    weight: Tensor | None = None,
    look: Callable[[], Sequence[tuple[int, int]] | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Entries of every pair, and the sum of all rows' products.

    A row's product is multiplied by a power of two near its factor before anything is squared (a loss's weight on a row
    can be so small that squares would vanish), and divided by it again on its way into the sum, which is therefore
    right whatever the factors are.

    Args:
        u: `[R, T, O]`, any float dtype.
        v: `[R, T, I]`.
        places: R numbers: where a row belongs among the 2k, 0..k-1 chosen and k..2k-1 rejected; -1 for nowhere.
        factors: R numbers; a row of factor 0 counts as zero in the entries, and once in the sum.
        pairs: k.
        budget: bytes that the tiles may take, or the kernel's sums of tiles and, where a factor is far from 1, its
            scaled copy of u; the sum of all rows comes on top.
        weight: `[O, I]` or None; multiplies a product's entries before they are squared, not the sum.
        look: finds of each row the tokens outside of which u or v is zero, where that spares something; None for all.

    Returns:
        `(entries [k, 3] float64, sum [O, I])`, the sum in the accumulator's dtype.
    """
    powers, couples = _powers(factors), _couples(places, pairs)
    if on_kernels(u, v):
        found = attempt(u.device, partial(_by_kernel, u, v, places, factors, pairs, weight, budget))
        if found is not None:
            return found
    if sorted(places) == list(range(2 * pairs)) and products_fit(u, v, len(u), budget):
        return _together(u, v, places, factors, pairs, weight)
    wide, row_spans = accumulator(u.dtype), None if look is None else look()
    (_, _, rows), cols = u.shape, v.shape[2]
    room = min(tile_room(budget), TILE) // wide.itemsize
    widened = 0 if u.dtype == v.dtype == wide else DEPTH  # numbers of a copy for each row and column of a tile
    width = min(cols, max(1, room // (4 * max(widened, 1))))
    height = max(1, min(rows, (room - widened * width) // (2 * width + widened)))
    buffer = torch.empty(2 * height * width, dtype=wide, device=u.device)
    total = torch.zeros(rows, cols, dtype=wide, device=u.device)
    entries = torch.zeros(pairs, 3, dtype=torch.float64, device=u.device)
    for top in spans(rows, height):
        for left in spans(cols, width):
            goal = total[top, left]
            tile = buffer[: 2 * goal.numel()].view(2, *goal.shape)
            for number, couple in enumerate(couples):
                for side, row in zip(tile, couple, strict=True):
                    if row is None:
                        side.zero_()
                        continue
                    live = slice(*row_spans[row]) if row_spans is not None else slice(None)
                    put_product(u[row, live, top], v[row, live, left], DEPTH, side, scale=powers[row])
                    goal.add_(side, alpha=1 / powers[row])
                if number < pairs:
                    if weight is not None:
                        tile *= weight[top, left]
                    entries[number] += reduce_flat(tile.view(2, -1))
    return entries * sent(_rest(factors, powers, couples[:pairs]), entries.device), total


def _together(
    u: Tensor, v: Tensor, places: Sequence[int], factors: Sequence[float], pairs: int, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same with all rows' products held at once: they are small. Every row belongs to a pair."""
    powers = _powers(factors)
    grads = row_products(u, v)
    total = grads.sum(0).contiguous()
    if any(power != 1 for power in powers):
        grads *= sent(torch.tensor(powers, dtype=grads.dtype), grads.device)[:, None, None]
    if weight is not None:
        grads *= weight
    if list(places) != list(range(len(places))):
        grads = grads[sent(torch.tensor(places).argsort(), grads.device)]
    rest = sent(_rest(factors, powers, _couples(places, pairs)), grads.device)
    return reduce_tiles(in_memory_order(grads)) * rest, total


def _couples(places: Sequence[int], pairs: int) -> list[tuple[int | None, int | None]]:
    """The rows of each pair, and then each row that is in none."""
    at = {place: row for row, place in enumerate(places) if place >= 0}
    loose: list[tuple[int | None, int | None]] = [(row, None) for row, place in enumerate(places) if place < 0]
    return [*((at.get(pair), at.get(pair + pairs)) for pair in range(pairs)), *loose]


def _powers(factors: Sequence[float]) -> list[float]:
    """Powers of two near the factors, within what float32 can divide by; 1 for those that can wait."""
    return [
        1.0 if not factor or can_wait(factor) else 2.0 ** min(120, max(-120, math.frexp(factor)[1]))
        for factor in factors
    ]


def _rest(
    factors: Sequence[float], powers: Sequence[float], couples: Sequence[tuple[int | None, int | None]]
) -> Tensor:
    """What is left of the factors in each pair's entries, float64 `[k, 3]`."""
    left = torch.tensor([*(f / power for f, power in zip(factors, powers, strict=True)), 0.0], dtype=torch.float64)
    chosen, rejected = (left[[-1 if pair[side] is None else pair[side] for pair in couples]] for side in (0, 1))
    return torch.stack([chosen**2, rejected**2, chosen * rejected], 1)


def _by_kernel(
    u: Tensor,
    v: Tensor,
    places: Sequence[int],
    factors: Sequence[float],
    pairs: int,
    weight: Tensor | None,
    budget: int,
) -> tuple[Tensor, Tensor] | None:
    """The same by the kernel that stores the sum; None, and announced, if it is over the budget."""
    from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415  (imports Triton)
    from gradent.kernels.outer.triton import outer_scratch, outer_with_gradient  # noqa: PLC0415  (imports Triton)

    count, tokens, _ = u.shape
    powers, couples = _powers(factors), _couples(places, pairs)
    # A side without a row gets an empty span, and a share of 0.
    sides = [[count if row is None else row for row in side] for side in zip(*couples, strict=True)]
    spans: list[list[int]] = []
    for side in sides:
        spans += [[min(row, count - 1) * tokens for row in side], [tokens if row < count else 0 for row in side]]
    where = Spans(*spans)
    scaled, others = u.flatten(0, 1), v.flatten(0, 1)
    # A power of two rounds nothing, but the range of float16 is too small for it.
    kept, moved = torch.float32 if u.dtype == torch.float16 else u.dtype, any(power != 1 for power in powers)
    needed = outer_scratch(scaled, others, scaled, others, where, store=True) + moved * u.numel() * kept.itemsize
    if needed > budget:
        announce_budget(u.device, needed, budget)
        return None
    if moved:
        scaled = (u * sent(torch.tensor(powers, dtype=kept), u.device)[:, None, None]).flatten(0, 1)
    shares = torch.tensor([*(1 / power for power in powers), 0.0])
    coefficients = torch.stack([shares[side] for side in sides], 1)
    entries, total = outer_with_gradient(scaled, others, scaled, others, where, coefficients, weight)
    return entries[:pairs] * sent(_rest(factors, powers, couples[:pairs]), entries.device), total
