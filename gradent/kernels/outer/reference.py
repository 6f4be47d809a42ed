"""The outer form in plain torch: tiles of the rows' gradients, held side by side and multiplied by each other.

Letters: N rows, n rows of one group, T tokens, O and I the two sides of a weight, D directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradent.kernels.common.account import AccountSums
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

__all__ = ["account_all_rows", "account_outer", "account_tiled", "reduce_all_rows", "reduce_outer", "reduce_tiled"]

Place = tuple[slice, slice]
"""Rows and columns of a weight that a tile covers."""


def reduce_outer(
    factors: Factors, tiling: Tiling, weight: Tensor | None = None, directions: Tensor | None = None
) -> Tensor:
    """A group's entries `[m]` float64 from the factors of n rows; `weight` `[O, I]` multiplies every gradient."""
    u, v = factors[0]
    turned = is_turned(u, v)
    wide = accumulator(*(part.dtype for row in factors for part in row))
    put = _put_factors(factors, tiling.depth, turned=turned)
    with exact_products(u.device):
        shape = u.shape[1], v.shape[1]
        return reduce_tiled(put, len(factors), shape, tiling.tile, wide, u.device, weight, directions, turned=turned)


def _put_factors(factors: Factors, depth: int, *, turned: bool) -> Callable[[int, Place, Tensor], None]:
    """What writes a row's tile, column by column where it is turned."""

    def put(row: int, place: Place, out: Tensor) -> None:
        u, v = (part[:, side] for part, side in zip(factors[row], place, strict=True))
        if turned:
            put_product(v, u, depth, out.view(out.shape[1], out.shape[0]))
        else:
            put_product(u, v, depth, out)

    return put


def account_outer(factors: Factors, tiling: Tiling, sums: AccountSums) -> Tensor:
    """Entries `[M]` of a step's account from the factors of all rows."""
    u, v = factors[0]
    wide = accumulator(*(part.dtype for row in factors for part in row))
    put = _put_factors(factors, tiling.depth, turned=False)
    with exact_products(u.device):
        return account_tiled(put, len(factors), (u.shape[1], v.shape[1]), tiling.tile, wide, u.device, sums)


def account_tiled(
    put: Callable[[int, Place, Tensor], None],
    rows: int,
    shape: tuple[int, int],
    tile: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    sums: AccountSums,
) -> Tensor:
    """Entries `[M]` of a step's account from whatever `put` writes as a row's tile."""
    buffer = torch.empty(rows * tile[0] * tile[1], dtype=dtype, device=device)
    for top in spans(shape[0], tile[0]):
        for left in spans(shape[1], tile[1]):
            sides = top.stop - top.start, left.stop - left.start
            part = buffer[: rows * sides[0] * sides[1]].view(rows, *sides)
            for row in range(rows):
                put(row, (top, left), part[row])
            sums.add(part, (top, left))
    return sums.entries


def account_all_rows(grads: Tensor, sums: AccountSums) -> Tensor:
    """Entries `[M]` of a step's account from the gradients of all rows, `[N, ...]` wide, which are written to."""
    sums.add(grads.contiguous(), ...)
    return sums.entries


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
) -> Tensor:
    """A group's entries `[m]` from whatever `put` writes as a row's tile; with `turned`, column by column."""
    extra = 0 if directions is None else len(directions)
    buffer = torch.empty((rows + extra) * tile[0] * tile[1], dtype=dtype, device=device)
    gram = torch.zeros(rows + extra, rows, dtype=torch.float64, device=device)
    for top in spans(shape[0], tile[0]):
        for left in spans(shape[1], tile[1]):
            sides = top.stop - top.start, left.stop - left.start
            part = buffer[: (rows + extra) * sides[0] * sides[1]].view(rows + extra, *sides)
            for row in range(rows):
                put(row, (top, left), part[row])
            grid = part.view(rows + extra, sides[1], sides[0]).mT if turned else part
            if directions is not None:
                grid[rows:] = directions[:, top, left]
            if weight is not None:
                grid *= weight[top, left]
            flat = part.view(rows + extra, -1)
            gram += dots(flat, flat[:rows])
    return pick(gram, rows)


@exactly
def reduce_all_rows(
    u: Tensor, v: Tensor, wanted: Wanted, weight: Tensor | None = None, directions: Tensor | None = None
) -> Tensor:
    """Entries `[M]` float64 of all groups at once, from u `[N, T, O]` and v `[N, T, I]`: one batched product."""
    grads = row_products(u, v)
    if weight is not None:
        grads *= weight
        directions = None if directions is None else directions * weight
    return reduce_tiles(grads, wanted, directions)
