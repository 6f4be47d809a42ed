"""Which tile a kernel takes and what it holds, from sizes alone: nothing here imports Triton.

Letters: T tokens, O and I the two sides of a weight, K the axis that a product contracts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from gradent.kernels.common.triton_operands import CACHED, Groups, Spans

__all__ = [
    "REACH",
    "Config",
    "GroupLaunch",
    "GroupsPlan",
    "gram_bytes",
    "gram_configs",
    "gram_tiles",
    "group_block",
    "group_configs",
    "group_side",
    "is_deep",
    "outer_bytes",
    "outer_configs",
    "outer_tiles",
    "pick_gram",
    "pick_groups",
    "pick_outer",
    "plan_groups",
    "unit",
]

WAVE = 128
"""Programs that keep a device busy (an H100 has 132 multiprocessors): where fewer would run, tiles are halved."""

CACHE = 32 * 2**20
"""Bytes that are written and soon read again: they stay in the second-level cache (A100 40 MiB, H100 50)."""

DEEP = 200 * 1024
"""Bytes of shared memory with which a block can hold the deepest pipelines: H100 and B200 have 227 KiB, A100 163."""

REACH = 2**31 // (2 * 128)
"""Strides from here on are FAR: a tile is up to 128 entries along either axis."""

PARTIAL = 8
"""Bytes of a tile's sum: float64, or else `sum` would first make a float64 copy of them all."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes that a kernel is compiled for."""

    rows: int  # of a tile: tokens (gram) or outputs (outer); a power of two, 16 or more
    cols: int  # of a tile: tokens (gram, equal to `rows`) or inputs (outer)
    depth: int  # length of the contracted axis taken at once
    warps: int  # a program
    stages: int  # of the software pipeline


@dataclass(frozen=True, kw_only=True)
class GroupLaunch:
    """How the outer kernel goes through groups of more than two rows."""

    config: Config
    programs: int  # a group; each goes from tile to tile and keeps those of all the group's rows in one place
    together: int  # groups a launch
    tiles: int  # bytes of these places, float32
    scratch: int  # bytes in all: places, sums of all groups, tables


class GroupsPlan(NamedTuple):
    """The tile for groups of one and two rows, the launch for larger ones, and the bytes of both besides the result."""

    small: Config | None
    large: GroupLaunch | None
    scratch: int


def pick_gram(dtype: torch.dtype, longest: int, pairs: float) -> Config:
    """The gram kernel's tile for rows of up to `longest` tokens; a group of n rows counts as n²/4 pairs."""
    side = _side(dtype, longest)
    # T²/2 + T²/2 + T² over the area of a tile.
    while side > 32 and 2 * pairs * math.ceil(longest / side) ** 2 < WAVE:
        side //= 2
    return _gram(dtype, side)


def pick_outer(dtype: torch.dtype, rows: int, cols: int, pairs: int, *, store: bool, deep: bool = True) -> Config:
    """The outer kernel's tile of an `[O, I]` weight for `pairs` that run beside each other (1 if it stores)."""
    height, width = _side(dtype, rows), _side(dtype, cols)
    if store and height == width == 128:
        width = 64  # the gradient takes a third accumulator
    while max(height, width) > 32 and pairs * math.ceil(rows / height) * math.ceil(cols / width) < WAVE:
        height, width = _halved(height, width)
    return _outer(dtype, height, width, store, deep)


def pick_groups(dtype: torch.dtype, rows: int, cols: int, sizes: Sequence[int], *, budget: int) -> GroupLaunch:
    """The launch for groups of `sizes` rows: tiles that stay in a cache, within the budget if any are."""
    wave, together = WAVE, min(len(sizes), WAVE)
    config = pick_outer(dtype, rows, cols, together, store=True)
    height, width = config.rows, config.cols
    while True:
        launch = _group_launch(_grouped(dtype, height, width), rows, cols, sizes, wave, together)
        if launch.tiles <= CACHE and launch.scratch <= budget:
            return launch
        if max(height, width) > 32 or (together == launch.programs == 1 and max(height, width) > 16):
            height, width = _halved(height, width)
        elif launch.programs > 1:
            wave //= 2
        elif together > 1:
            together = (together + 1) // 2
        else:
            return launch


def plan_groups(
    dtype: torch.dtype,
    rows: int,
    cols: int,
    groups: Groups,
    *,
    budget: int,
    deep: bool = True,
    config: Config | None = None,
) -> GroupsPlan:
    """How the outer kernels reduce groups of any size on an `[O, I]` weight; a given tile is for the larger ones."""
    pairs, sizes = sum(size in (1, 2) for size in groups.sizes), [size for size in groups.sizes if size > 2]
    small, large = None, None
    scratch = 8 * groups.count  # which of the sums go where
    if pairs:
        small = pick_outer(dtype, rows, cols, pairs, store=False, deep=deep)
        scratch += outer_bytes(rows, cols, pairs, small) + 2 * 3 * PARTIAL * pairs
    if sizes:
        large = (
            _group_launch(config, rows, cols, sizes, WAVE, min(len(sizes), WAVE))
            if config
            else pick_groups(dtype, rows, cols, sizes, budget=budget - scratch)
        )
        scratch += large.scratch
    return GroupsPlan(small, large, scratch)


def gram_configs(dtype: torch.dtype) -> list[Config]:
    """Every configuration that `pick_gram` returns for a dtype, the smallest tile first."""
    return [_gram(dtype, side) for side in _sides(dtype)]


def outer_configs(dtype: torch.dtype, *, store: bool, deep: bool = True) -> list[Config]:
    """Every configuration that `pick_outer` returns for a dtype, the smallest tile first."""
    sides = [(height, width) for height in _sides(dtype) for width in _sides(dtype)]
    return [_outer(dtype, *side, store, deep) for side in sides if not (store and side == (128, 128))]


def group_configs(dtype: torch.dtype) -> list[Config]:
    """Every configuration that `pick_groups` returns for a dtype, the smallest tile first."""
    return [_grouped(dtype, config.rows, config.cols) for config in outer_configs(dtype, store=True)]


def gram_bytes(dtype: torch.dtype, spans: Spans | Groups) -> int:
    """Bytes that the gram kernel holds besides its result: a float64 a tile and product, and a table."""
    side = pick_gram(dtype, spans.longest, spans.pairs).rows
    return spans.count * (PARTIAL * gram_tiles(spans, side) + 5 * 8)


def outer_bytes(rows: int, cols: int, pairs: int, config: Config, *, store: bool = False) -> int:
    """Bytes that the outer kernel holds besides its results: three float64 a tile and pair, a table, coefficients."""
    return pairs * (3 * PARTIAL * outer_tiles(rows, cols, config) + 4 * 8 + 2 * 4 * store)


@lru_cache(maxsize=CACHED)
def gram_tiles(spans: Spans | Groups, side: int) -> int:
    """Tiles of the largest of all products; smaller ones have as many programs, and the rest of them is idle."""
    most = [0]
    for kind, left, right in {(kind, left, right) for kind, _, left, _, right in spans.products}:
        tall, wide = math.ceil(left / side), math.ceil(right / side)
        most.append((tall * (tall + 1) // 2, wide * (wide + 1) // 2, tall * wide)[kind])
    return max(most)


def outer_tiles(rows: int, cols: int, config: Config) -> int:
    """Tiles of an `[O, I]` weight."""
    return math.ceil(rows / config.rows) * math.ceil(cols / config.cols)


def group_block(most: int) -> int:
    """How many rows of a group are multiplied with as many others at once, in registers."""
    return 4 if most <= 4 else 8


def group_side(most: int) -> int:
    """Rows of a group, padded to whole blocks."""
    return math.ceil(most / group_block(most)) * group_block(most)


def _group_launch(config: Config, rows: int, cols: int, sizes: Sequence[int], wave: int, together: int) -> GroupLaunch:
    most, programs = max(sizes), max(1, min(outer_tiles(rows, cols, config), wave // together))
    tiles = 4 * together * programs * most * config.rows * config.cols
    # The sums, their sum over programs, and a copy of that beside those of pairs.
    sums = PARTIAL * len(sizes) * (programs + 2) * group_side(most) ** 2
    table = 2 * 8 * (len(sizes) + sum(sizes))
    return GroupLaunch(config=config, programs=programs, together=together, tiles=tiles, scratch=tiles + sums + table)


def _halved(height: int, width: int) -> tuple[int, int]:
    return (height // 2, width) if height > width else (height, width // 2)


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


def _grouped(dtype: torch.dtype, rows: int, cols: int) -> Config:
    config = _outer(dtype, rows, cols, False, False)
    return config if dtype == torch.float32 else replace(config, depth=64)


@lru_cache
def is_deep(device: torch.device) -> bool:
    """Whether a block has the shared memory of an H100's. The interpreter, which has no limit, goes by an H100."""
    if device.type != "cuda":
        return True
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)) >= DEEP


def unit(*numbers: int) -> int:
    """What a kernel is told a size and the strides along it in: 8 where it divides them all, else 1."""
    # Multiplied by 8 inside, a kernel knows that rows start and end at a multiple of 16 bytes, which copies in the
    # background need. Triton itself would look for multiples of 16 entries, which LoRA's r = 8 is not.
    return 8 if all(number % 8 == 0 and number < 2**31 for number in numbers) else 1
