"""The outer form in plain torch: tiles of the rows' gradients, held side by side and multiplied by each other.

Letters: N rows, n rows of one group, T tokens, O and I the two sides of a weight, D directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradent.kernels.common.cost import Tiling
from gradent.kernels.common.numerics import (
    Factors,
    accumulator,
    dots,
    is_turned,
    put_product,
    reduce_tiles,
    row_products,
    spans,
)
from gradent.kernels.common.precision import exact_products, exactly
from gradent.kernels.common.wanted import Wanted, pick

__all__ = ["reduce_all_rows", "reduce_outer", "reduce_tiled"]

Place = tuple[slice, slice]
"""Rows and columns of a weight that a tile covers."""


def reduce_outer(
    factors: Factors,
    tiling: Tiling,
    weight: Tensor | None = None,
    directions: Tensor | None = None,
    plain: int = 0,
) -> Tensor:
    """A group's entries `[m]` float64 from the factors of n rows; `weight` `[O, I]` multiplies every gradient."""
    u, v = factors[0]
    turned = is_turned(u, v)
    wide = accumulator(*(part.dtype for row in factors for part in row))

    def put(row: int, place: Place, out: Tensor) -> None:
        u, v = (part[:, side] for part, side in zip(factors[row], place, strict=True))
        if turned:
            put_product(v, u, tiling.depth, out.view(out.shape[1], out.shape[0]))
        else:
            put_product(u, v, tiling.depth, out)

    with exact_products(u.device):
        shape = u.shape[1], v.shape[1]
        return reduce_tiled(
            put, len(factors), shape, tiling.tile, wide, u.device, weight, directions, turned=turned, plain=plain
        )


def reduce_tiled(
    put: Callable[[int, Place, Tensor], None],
    rows: int,
    shape: tuple[int, int],
    tile: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    weight: Tensor | None = None,
    directions: Tensor | None = None,
    *,
    turned: bool = False,
    plain: int = 0,
) -> Tensor:
    """A group's entries `[m]` from whatever `put` writes as a row's tile; with `turned`, column by column."""
    extra = 0 if directions is None else len(directions)
    buffer = torch.empty((rows + extra) * tile[0] * tile[1], dtype=dtype, device=device)
    gram = torch.zeros(rows + extra, rows, dtype=torch.float64, device=device)
    bare = torch.zeros(rows, rows, dtype=torch.float64, device=device) if plain else None
    for top in spans(shape[0], tile[0]):
        for left in spans(shape[1], tile[1]):
            sides = top.stop - top.start, left.stop - left.start
            part = buffer[: (rows + extra) * sides[0] * sides[1]].view(rows + extra, *sides)
            for row in range(rows):
                put(row, (top, left), part[row])
            grid = part.view(rows + extra, sides[1], sides[0]).mT if turned else part
            flat = part.view(rows + extra, -1)
            if bare is not None:
                bare += dots(flat[:rows], flat[:rows])
            if directions is not None:
                grid[rows:] = directions[:, top, left]
            if weight is not None:
                grid *= weight[top, left]
            gram += dots(flat, flat[:rows])
    return pick(gram, rows, bare, plain)


@exactly
def reduce_all_rows(
    u: Tensor, v: Tensor, wanted: Wanted, weight: Tensor | None = None, directions: Tensor | None = None
) -> Tensor:
    """Entries `[M]` float64 of all groups at once, from u `[N, T, O]` and v `[N, T, I]`: one batched product."""
    return reduce_tiles(row_products(u, v), wanted, directions, weight, own=True)
