"""What a launch of Triton's kernels takes, from numbers alone. Importing it imports Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from gradent.kernels.common.tiles import pick_gram, pick_outer
from gradent.kernels.common.triton_operands import Spans
from gradent.kernels.gram.triton import gram_scratch
from gradent.kernels.outer.triton import outer_scratch

if TYPE_CHECKING:
    from gradent.kernels.strategy import Product

__all__ = ["kernel_cost"]


def kernel_cost(
    form: Literal["gram", "outer"], product: Product, groups: int, flops: int
) -> tuple[tuple[int, int], int, int]:
    """`(tile, scratch, flops of a group)` of one launch for some groups of two rows; `flops` as torch counts them."""
    length = max(product.lengths)
    u, v = (
        torch.empty(groups * length, size, dtype=dtype, device="meta")
        for size, dtype in zip((product.out, product.inp), product.dtypes, strict=True)
    )
    factors = (u, v, u, v, Spans.padded(groups, length))
    wide = u.dtype if u.dtype == torch.float32 else v.dtype
    if form == "outer":
        config = pick_outer(wide, product.out, product.inp, groups, store=False)
        return (config.rows, config.cols), outer_scratch(*factors), flops
    config = pick_gram(wide, length, groups)
    count, rest = divmod(length, config.rows)
    triangle = (length**2 + count * config.rows**2 + rest**2) // 2  # tiles on and below the diagonal
    flops = 2 * (product.out + product.inp) * (2 * triangle + length**2)
    return (config.rows, config.cols), gram_scratch(*factors), flops
