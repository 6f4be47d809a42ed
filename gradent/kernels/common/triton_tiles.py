"""What the kernels share: how large a tile is, how one is loaded, and how products are added up.

Letters: T tokens, O and I the two sides of a weight, K the axis that a product contracts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "LOOSE",
    "REACH",
    "UNITED",
    "Config",
    "accumulate",
    "gram_configs",
    "is_deep",
    "load_tile",
    "outer_configs",
    "pick_gram",
    "pick_outer",
    "unit",
]

WAVE = 128
"""Programs that keep a device busy (an H100 has 132 multiprocessors): where fewer would run, tiles are halved."""

DEEP = 200 * 1024
"""Bytes of shared memory, 192 KiB and what the driver takes, with which a block can hold the deepest pipelines.

An H100 and a B200 have 227 KiB; an A100 has 163, an L4 and a consumer's card 99.
"""

LOOSE = ("tiles", "pairs", "O", "I")
"""Arguments of which a compilation knows nothing: a 1 or a multiple of 16 among them would be compiled for itself."""

UNITED = ("uw_t", "vw_t", "ul_t", "vl_t", "weight_o")
"""Strides that are told in a `unit`; one of them that is 1 (a matrix that lies column by column) is compiled for."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes that a kernel is compiled for.

    Attributes:
        rows: height of a tile: tokens (gram) or outputs (outer); a power of two, 16 or more.
        cols: width of a tile: tokens (gram, equal to `rows`) or inputs (outer).
        depth: length of the contracted axis taken at once.
        warps: warps a program.
        stages: depth of the software pipeline.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def pick_gram(dtype: torch.dtype, longest: int, pairs: int) -> Config:
    """The configuration of the gram kernel.

    Args:
        dtype: the wider of the operands' dtypes.
        longest: most tokens of a row.
        pairs: k.

    Returns:
        One of `gram_configs(dtype)`.
    """
    side = _side(dtype, longest)
    # T²/2 + T²/2 + T² over the area of a tile.
    while side > 32 and 2 * pairs * math.ceil(longest / side) ** 2 < WAVE:
        side //= 2
    return _gram(dtype, side)


def pick_outer(dtype: torch.dtype, rows: int, cols: int, pairs: int, *, store: bool, deep: bool = True) -> Config:
    """The configuration of the outer kernel.

    Args:
        dtype: the dtype in which u and v meet.
        rows: O.
        cols: I.
        pairs: pairs that run beside each other: k, or 1 where the gradient is stored.
        store: the gradient is stored, which takes a third accumulator.
        deep: whether the device `is_deep`.

    Returns:
        One of `outer_configs(dtype, store=store, deep=deep)`.
    """
    height, width = _side(dtype, rows), _side(dtype, cols)
    if store and height == width == 128:
        width = 64
    while max(height, width) > 32 and pairs * math.ceil(rows / height) * math.ceil(cols / width) < WAVE:
        height, width = (height // 2, width) if height > width else (height, width // 2)
    return _outer(dtype, height, width, store, deep)


def gram_configs(dtype: torch.dtype) -> list[Config]:
    """Every configuration that `pick_gram` returns for a dtype, the smallest tile first."""
    return [_gram(dtype, side) for side in _sides(dtype)]


def outer_configs(dtype: torch.dtype, *, store: bool, deep: bool = True) -> list[Config]:
    """Every configuration that `pick_outer` returns for a dtype, the smallest tile first."""
    sides = [(height, width) for height in _sides(dtype) for width in _sides(dtype)]
    return [_outer(dtype, *side, store, deep) for side in sides if not (store and side == (128, 128))]


def _sides(dtype: torch.dtype) -> tuple[int, ...]:
    return (16, 32, 64) if dtype == torch.float32 else (16, 32, 64, 128)


def _side(dtype: torch.dtype, size: int) -> int:
    return min(_sides(dtype)[-1], max(16, 1 << max(0, size - 1).bit_length()))


# Warps and depths are those that spill no register on sm_90, with Triton 3.6 and 3.9: benchmarks/results/sm90.csv.
# A depth is also how many products a tensor core adds up by itself (`accumulate`). In a model of one that cuts sums of
# 16 products off after 24 bits, entries of chains of 128 are off by at most 0.06 of what the self-check allows:
# `test_what_a_tensor_core_adds_up_by_itself` is that model.


def _gram(dtype: torch.dtype, side: int) -> Config:
    warps = 8 if side == 128 else 4 if side >= 32 else 2
    return Config(rows=side, cols=side, depth=32 if dtype == torch.float32 else 64, warps=warps, stages=3)


def _outer(dtype: torch.dtype, rows: int, cols: int, store: bool, deep: bool) -> Config:
    single = dtype == torch.float32
    many = 64 * 32 if store else 64 * 64 if single else 128 * 64
    warps = 8 if rows * cols >= many else 4 if rows * cols >= 16 * 32 else 2
    depth = 64 if not store and min(rows, cols) >= 32 else 32
    if single:
        depth = 16 if store and rows * cols == 64 * 64 else 32
    elif (rows, cols) == (16, 128) and not store:  # with fewer warps the metric's root would not fit the registers
        return Config(rows=rows, cols=cols, depth=64, warps=8, stages=3)
    elif deep and rows * cols == (128 * 64 if store else 128 * 128):
        return Config(rows=rows, cols=cols, depth=128, warps=warps, stages=2 if store else 3)
    return Config(rows=rows, cols=cols, depth=depth, warps=warps, stages=3)


@lru_cache
def is_deep(device: torch.device) -> bool:
    """Whether a block has the shared memory of an H100's. The interpreter, which has no limit, goes by an H100."""
    if device.type != "cuda":
        return True
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)) >= DEEP


def unit(*numbers: int) -> int:
    """What a size and the strides along it are counted in when a kernel is launched, and multiplied by inside.

    Multiplied by 8, a kernel knows that rows start and end at a multiple of 16 bytes, which copies in the background
    need. Triton itself would look for multiples of 16 entries, which LoRA's r = 8 is not.

    Args:
        numbers: the size and strides.

    Returns:
        8 where it divides them all, else 1.
    """
    return 8 if all(number % 8 == 0 and number < 2**31 for number in numbers) else 1


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


REACH = 2**31 // (2 * 128)
"""Strides from here on are FAR: a tile is up to 128 entries along either axis."""

INTERPRETED: bool = not isinstance(load_tile, triton.JITFunction)
"""Whether this process runs kernels on the CPU, in Triton's interpreter."""
