"""What the kernels share: what they are told, how a tile is loaded, and how products are added up."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gradent.errors import InputError
from gradent.kernels.common.tiles import REACH, Config, unit
from gradent.kernels.common.triton_operands import Factors

__all__ = ["INTERPRETED", "LOOSE", "UNITED", "accumulate", "arguments", "load_tile"]

LOOSE = ("tiles", "pairs", "programs", "most", "skipped", "O", "I")
"""Arguments of which a compilation knows nothing: a 1 or a multiple of 16 among them would be compiled for itself."""

UNITED = ("uw_t", "vw_t", "ul_t", "vl_t", "u_t", "v_t", "weight_o")
"""Strides that are told in a `unit`; one of them that is 1 (a matrix that lies column by column) is compiled for."""


def arguments(
    factors: Factors, config: Config, weight: Tensor | None = None, *, sides: int = 2
) -> tuple[list[int], dict[str, Any]]:
    """What kernels are told in their arguments' order, sizes and then strides, and what a launch is compiled for."""
    rows, cols, strides = factors.rows, factors.cols, factors.strides[: 4 * sides]
    if weight is not None and weight.shape != (rows, cols):
        raise InputError(f"weight is [{rows}, {cols}]; got {list(weight.shape)}.")
    weight_o, weight_i = weight.stride() if weight is not None else (0, 0)
    unit_o, unit_i = unit(rows, *strides[::4]), unit(cols, *strides[2::4], weight_o)
    units = (unit_o, 1, unit_i, 1) * sides
    told = [rows // unit_o, cols // unit_i, *(stride // size for stride, size in zip(strides, units, strict=True))]
    constants = {
        "UNIT_O": unit_o,
        "UNIT_I": unit_i,
        "DEPTH": config.depth,
        "FAR": max(*strides, weight_o, weight_i) >= REACH,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    return [*told, weight_o // unit_i, weight_i], constants


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_tile(
    base: tl.tensor,
    row: tl.tensor,
    row_stop: tl.tensor,
    col: tl.tensor,
    col_stop: tl.tensor,
    row_stride: tl.tensor,
    col_stride: tl.tensor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FAR: tl.constexpr,
) -> tl.tensor:
    """`[HEIGHT, WIDTH]` of a matrix of any strides, from `[row, col]` on; zeros beyond `row_stop` and `col_stop`."""
    # Where a tile starts is int64; where its entries are from there is int32, which takes half of the registers,
    # unless strides are so large (FAR) that a tile alone is longer than that.
    wide = tl.full((), 1, tl.int64)
    base += wide * row * row_stride + wide * col * col_stride
    rows = tl.arange(0, HEIGHT)
    cols = tl.arange(0, WIDTH)
    inside = (rows < row_stop - row)[:, None] & (cols < col_stop - col)[None, :]
    if FAR:
        offsets = rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    else:
        offsets = rows[:, None] * row_stride + cols[None, :] * col_stride
    return tl.load(base + offsets, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def accumulate(total: tl.tensor, left: tl.tensor, right: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """`total + left @ right`, float32; `left @ right` starts from zero each time."""
    # A tensor core rounds additions towards zero, so that a long chain of them drifts, and drifts one way (Fasi et al.,
    # "Numerical behavior of NVIDIA tensor cores", 2021). Only the few steps inside `left @ right` are left to it; sums
    # go on rounded to nearest. `max_num_imprecise_acc` keeps the compiler from merging the two: see CombineDotAddF in
    # Triton's Combine.td. It has no other effect on what is wider than fp8.
    if WIDE:  # operands of two dtypes, or the interpreter, which multiplies the bits of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return total + tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=1)


INTERPRETED: bool = not isinstance(load_tile, triton.JITFunction)
"""Whether this process runs kernels on the CPU, in Triton's interpreter."""
