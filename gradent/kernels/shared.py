"""Statistics inside the weight gradient: every row's product is formed once, for its pair's entries and for the sum.

A backward pass multiplies `Σ_t u_t v_tᵀ` over all rows of a batch to have a weight's gradient. Formed row by row, the
same products give each pair's Gram entries as well, so that these cost no further matrix product.

Letters: k pairs, R rows, T tokens, O and I the two sides of a weight `[O, I]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradent.kernels.reference import accumulator, reduce_flat, spans

__all__ = ["reduce_shared"]

TILE = 2**22
"""Bytes of one pair's two tiles at most: near enough to the caches, and long enough for a product to run at speed."""


def reduce_shared(
    u: Tensor,
    v: Tensor,
    places: Sequence[int],
    factors: Sequence[float],
    *,
    pairs: int,
    budget: int,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Entries of every pair, and the sum of all rows' products.

    A row's product is multiplied by its factor before anything is squared (a loss's weight on a row can be so small
    that squares would vanish), and divided by it again on its way into the sum, which is therefore right whatever the
    factors are.

    Args:
        u: `[R, T, O]`, any float dtype.
        v: `[R, T, I]`.
        places: R numbers: where a row belongs among the 2k, 0..k-1 chosen and k..2k-1 rejected; -1 for nowhere.
        factors: R numbers; a row of factor 0 counts as zero in the entries, and once in the sum.
        pairs: k.
        budget: bytes that the tiles may take; the sum comes on top.
        weight: `[O, I]` or None; multiplies a product's entries before they are squared, not the sum.

    Returns:
        `(entries [k, 3] float64, sum [O, I])`, the sum in the accumulator's dtype.
    """
    wide = accumulator(u.dtype)
    (_, _, rows), cols = u.shape, v.shape[2]
    at = {place: row for row, place in enumerate(places) if place >= 0}
    couples = [(at.get(pair), at.get(pair + pairs)) for pair in range(pairs)]
    loose = [(row, None) for row, place in enumerate(places) if place < 0]
    room = min(budget, TILE) // (2 * wide.itemsize)
    width = min(cols, max(1, room))
    height = max(1, min(rows, room // width))
    buffer = torch.empty(2 * height * width, dtype=wide, device=u.device)
    total = torch.zeros(rows, cols, dtype=wide, device=u.device)
    entries = torch.zeros(pairs, 3, dtype=torch.float64, device=u.device)
    for top in spans(rows, height):
        for left in spans(cols, width):
            goal = total[top, left]
            tile = buffer[: 2 * goal.numel()].view(2, *goal.shape)
            for number, couple in enumerate([*couples, *loose]):
                live = False
                for side, row in zip(tile, couple, strict=True):
                    factor = 0.0 if row is None else factors[row]
                    if row is not None:
                        scale = factor or 1.0
                        left_part, right_part = u[row, :, top].to(wide).T, v[row, :, left].to(wide)
                        torch.addmm(side, left_part, right_part, beta=0, alpha=scale, out=side)
                        goal.add_(side, alpha=1 / scale)
                    if factor:
                        live = True
                    else:
                        side.zero_()
                if number < pairs and live:
                    if weight is not None:
                        tile *= weight[top, left]
                    entries[number] += reduce_flat(tile.view(2, -1))
    return entries, total
