"""The Gram form in plain torch: products of tokens, in tiles.

Letters: T tokens of one row, S of another, O and I the two sides of a weight, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradent.kernels.common.cost import Tiling
from gradent.kernels.common.numerics import Factors, accumulator, put_product, spans
from gradent.kernels.common.precision import exact_products

__all__ = ["along_directions", "reduce_gram"]


def reduce_gram(factors: Factors, tiling: Tiling, directions: Tensor | None = None, *, budget: int) -> Tensor:
    """A group's entries `[m]` float64 from the factors of n rows, and from directions `[D, O, I]`."""
    with exact_products(factors[0][0].device):
        couples = [(row, row) for row in factors]
        couples += [(row, other) for place, row in enumerate(factors) for other in factors[place + 1 :]]
        entries = torch.stack([_product(*row, *other, tiling) for row, other in couples])
        if directions is None:
            return entries
        return torch.cat([entries, *(along_directions(u, v, directions, budget=budget) for u, v in factors)])


def along_directions(u: Tensor, v: Tensor, directions: Tensor, *, budget: int) -> Tensor:
    """`Σ_t u_tᵀ D v_t` of one row with directions `[D, O, I]`, float64 `[D]`: no gradient is formed."""
    wide = accumulator(u.dtype, v.dtype)
    step = max(1, budget // (wide.itemsize * (u.shape[1] + 2 * v.shape[1])))
    sums = [torch.zeros((), dtype=torch.float64, device=u.device) for _ in directions]
    for number, direction in enumerate(directions):
        for span in spans(len(u), step):
            sums[number] = sums[number] + _sum(torch.mm(u[span].to(wide), direction.to(wide)).mul_(v[span]))
    return torch.stack(sums)


def _product(u: Tensor, v: Tensor, x: Tensor, y: Tensor, tiling: Tiling) -> Tensor:
    """`Σ_{t,s} (u_t·x_s)(v_t·y_s)`, float64 scalar; of a row with itself, half of the tiles are formed."""
    wide = accumulator(u.dtype, v.dtype, x.dtype, y.dtype)
    height, width = tiling.tile
    if u.shape[0] <= height and x.shape[0] <= width and u.dtype == v.dtype == x.dtype == y.dtype == wide:
        return _sum(torch.mm(u, x.T).mul_(torch.mm(v, y.T)))  # one tile: short rows are many, and calls cost
    buffer = torch.empty(2 * height * width, dtype=wide, device=u.device)
    total = torch.zeros((), dtype=torch.float64, device=u.device)
    is_same = u is x and v is y and height == width
    for top in spans(u.shape[0], height):
        for left in spans(x.shape[0], width):
            if is_same and left.start > top.start:
                continue  # its mirror image counts twice
            shape = top.stop - top.start, left.stop - left.start
            part = buffer[: 2 * shape[0] * shape[1]].view(2, *shape)
            put_product(u[top].T, x[left].T, tiling.depth, part[0])
            put_product(v[top].T, y[left].T, tiling.depth, part[1])
            part[0] *= part[1]
            total += _sum(part[0]) * (2 if is_same and left.start < top.start else 1)
    return total


def _sum(values: Tensor) -> Tensor:
    """Sum of all entries, float64: float32 along the last axis (a row of T products), float64 across."""
    return values.sum(-1).sum(dtype=torch.float64)
