"""What `decide` says of products that Triton's kernels reduce, field by field, worked out here, and at their limits."""

from __future__ import annotations

from itertools import product as every
from typing import Any

import pytest
import torch

from tests.kernels.strategies import Given, Wanted, check, want

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIB = 2**20


def lower(length: int, side: int) -> int:
    """Entries on and below the diagonal of a square, counted one square tile after the other."""
    starts = range(0, length, side)
    return sum(min(side, length - top) * min(side, length - left) for top, left in every(starts, starts) if left <= top)


# Of pairs of up to 70 tokens gram has 6 rows' 9 products, of 3·3 tiles of 32 tokens at most: a float64 each, and five
# numbers a product. Its flops are those of the longest row throughout. Alone a pair has 3 products.
KERNELS = {"has_kernels": True, "is_complete": True}
PAIRS = {"rows": 5, "lengths": (70, 40), "out": 200, "inp": 160} | KERNELS
PAIR_BLOCKS = 2 * lower(70, 32) + 70 * 70
ALL, EACH = "in one launch of Triton's kernel for all groups", "in one launch of Triton's kernel for each group"
BY_32: dict[str, Any] = {"form": "gram", "tile": (32, 32), "flops": 2 * 360 * PAIR_BLOCKS, "backend": "triton"}
THREES = {"rows": 7, "lengths": (70, 40, 30), "out": 400, "inp": 320} | KERNELS
THREE_FLOPS = 2 * 720 * (3 * lower(70, 32) + 3 * 70 * 70)
# 64 pairs are enough programs for the largest tile: 64 of float32, 128 of narrower operands.
MANY = {"rows": 128, "lengths": (70, 70), "out": 400, "inp": 320} | KERNELS


def many(side: int, tiles: int) -> Wanted:
    flops = 2 * 720 * (2 * lower(70, side) + 70 * 70)
    scratch = 192 * (8 * tiles + 40)
    told = want(
        "gram", backend="triton", form="gram", tile=(side, side), scratch=scratch, flops=flops, rows=128, why=ALL
    )
    return {2**20: told}


GRAM_KERNELS = {
    "pairs": (
        PAIRS,
        {
            MIB: want("gram", scratch=9 * (8 * 9 + 40), rows=6, why=ALL, **BY_32),
            1008: want("gram", scratch=1008, rows=6, why=ALL, **BY_32),
            1007: want("group_by_group", scratch=336, rows=2, why=EACH, **BY_32),
            336: want("group_by_group", scratch=336, rows=2, why=EACH, **BY_32),
            # Torch's tiles are halved from 70 by 70 until two of them fit into 335 less 5 bytes.
            335: want(
                "group_by_group",
                form="gram",
                tile=(5, 5),
                depth=200,
                scratch=2 * 4 * 25,
                flops=2 * 360 * (lower(70, 5) + lower(40, 5) + 70 * 40),
                rows=2,
                refused=336,
                why="gram is the cheaper form, in tiles of one group",
            ),
        },
    ),
    "pairs beside what is copied": (
        PAIRS | {"copied": MIB - 1008},
        {MIB: want("gram", scratch=1008, rows=6, why=ALL, **BY_32)},
    ),
    "pairs one by one": (
        PAIRS | {"is_complete": False},
        {MIB: want("group_by_group", scratch=336, rows=2, why=EACH, **BY_32)},
    ),
    # 3 groups of 3 rows: 18 products.
    "threes": (
        THREES,
        {MIB: want("gram", scratch=18 * 112, rows=9, why=ALL, **BY_32 | {"flops": THREE_FLOPS})},
    ),
    # 6 products; the rows' 140 tokens are put side by side, 2 bytes for each of 400 numbers and 4 for each of 320.
    "threes one by one": (
        THREES | {"is_complete": False, "dtypes": (BF16, F32)},
        {
            MIB: want(
                "group_by_group",
                scratch=6 * 112 + 140 * (2 * 400 + 4 * 320),
                rows=3,
                why=EACH,
                **BY_32 | {"flops": THREE_FLOPS},
            )
        },
    ),
    "many": (MANY, many(64, 4)),
    "many in bfloat16": (MANY | {"dtypes": (BF16, BF16)}, many(128, 1)),
    "many, u in bfloat16": (MANY | {"dtypes": (BF16, F32)}, many(64, 4)),
    "many, v in bfloat16": (MANY | {"dtypes": (F32, BF16)}, many(64, 4)),
    "many in two dtypes": (MANY | {"dtypes": (BF16, F16)}, many(64, 4)),
}

CHEAP = "outer is the cheaper form, "
# 3 of 64 by 48 are 2·2 tiles of 32 by 32, a program each, which keeps three f32 tiles; of the sums a program, and two
# in all, have 4·4 f64; a table has two int64 a group and row; places of 6 products come on top.
TRIPLE = {"rows": 3, "lengths": (60, 50, 40), "out": 64, "inp": 48} | KERNELS
TRIPLE_FLOPS = 2 * 64 * 48 * (150 + 3 * 3)


def launch(groups: int, programs: int) -> int:
    tiles = 4 * groups * programs * 3 * 32 * 32
    return tiles + 8 * groups * (programs + 2) * 16 + 2 * 8 * (groups + 3 * groups) + 8 * 6 * groups


def threes(reducer: str, scratch: int, rows: int, why: str) -> dict[str, object]:
    return want(reducer, backend="triton", tile=(32, 32), scratch=scratch, flops=TRIPLE_FLOPS, rows=rows, why=why)


SIDE_BY_SIDE = 150 * 4 * (64 + 48)
LONG = {"rows": 256, "lengths": (200, 200), "out": 128, "inp": 128} | KERNELS


def long(side: int) -> Wanted:
    """Of 128 pairs: three f64 a tile, and four numbers."""
    scratch = 128 * (24 * (128 // side) ** 2 + 32)
    flops = 2 * 128 * 128 * (400 + 4)
    why = CHEAP + ALL
    return {2**24: want("outer", backend="triton", tile=(side, side), scratch=scratch, flops=flops, rows=256, why=why)}


OUTER_KERNELS = {
    # A kernel takes 24 bytes of a tile's sums and 32 of a table, torch twice 4 of two rows.
    "a number": (
        {"rows": 2, "lengths": (4, 4), "out": 1, "inp": 1} | KERNELS,
        {
            56: want("outer", backend="triton", tile=(16, 16), scratch=56, flops=2 * 12, rows=2, why=CHEAP + ALL),
            55: want("outer", tile=(1, 1), scratch=16, flops=2 * 12, rows=2, refused=56, why="all rows fit at once"),
        },
    ),
    # 3 pairs of 2·3 tiles.
    "pairs": (
        {"rows": 5, "lengths": (300, 100), "out": 40, "inp": 70} | KERNELS,
        {
            MIB: want(
                "outer",
                backend="triton",
                tile=(32, 32),
                scratch=3 * (24 * 6 + 32),
                flops=2 * 40 * 70 * (400 + 4),
                rows=6,
                why=CHEAP + ALL,
            )
        },
    ),
    # Each is half a pair: a tile, a table, two times three sums in float64, a product's place.
    "single rows": (
        {"rows": 3, "lengths": (50,), "out": 20, "inp": 20} | KERNELS,
        {
            MIB: want(
                "outer",
                backend="triton",
                tile=(32, 32),
                scratch=3 * (24 + 32 + 48 + 8),
                flops=2 * 400 * (50 + 1),
                rows=3,
                why=CHEAP + ALL,
            )
        },
    ),
    "threes": (TRIPLE, {MIB: threes("outer", launch(1, 4), 3, CHEAP + ALL)}),
    "two threes": (TRIPLE | {"rows": 6}, {MIB: threes("outer", launch(2, 4), 6, CHEAP + ALL)}),
    "threes one by one": (
        TRIPLE | {"is_complete": False, "has_factors": True},
        {
            MIB: threes("group_by_group", launch(1, 4) + SIDE_BY_SIDE, 3, CHEAP + EACH),
            # What is put side by side leaves no room for four programs' tiles.
            launch(1, 4) + SIDE_BY_SIDE - 1: threes("group_by_group", launch(1, 2) + SIDE_BY_SIDE, 3, CHEAP + EACH),
        },
    ),
    "many": (LONG, long(64)),
    "many in bfloat16": (LONG | {"dtypes": (BF16, BF16)}, long(128)),
    # Two narrow dtypes meet in float32.
    "many in two dtypes": (LONG | {"dtypes": (BF16, F16)}, long(64)),
}

TABLES = {"gram": GRAM_KERNELS, "outer": OUTER_KERNELS}
ROWS = [pytest.param(*row, id=f"{table}: {name}") for table, rows in TABLES.items() for name, row in rows.items()]


@pytest.mark.parametrize(("given", "wanted"), ROWS)
def test_every_field(given: Given, wanted: Wanted) -> None:
    check(given, wanted)
