"""What `decide` says of products that torch reduces, field by field, worked out here, and where a limit turns it.

In the comments tiles may take a budget less a 64th of it, and f32 takes 4 bytes.
"""

from __future__ import annotations

import pytest
import torch

from gradent.kernels.common.cost import Tiling
from gradent.kernels.strategy import Product, decide
from tests.kernels.strategies import Given, Wanted, check, want

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MIB = 2**20

THERE = {"is_materialized": True}
WAIT, FIT, LARGE = "so small that they wait", "all rows, and a copy of them, fit", "one group after the other"

THERE_ALREADY = {
    # 4 rows of 8 f32: 128 bytes, which is a quarter of 512; twice that is held. 2·8·n(n + D) flops.
    "wait": (
        {"rows": 4, "lengths": (1, 1), "out": 8, "directions": 1} | THERE,
        {
            512: want("queue", scratch=256, flops=2 * 8 * 2 * 3, rows=4, why=WAIT),
            511: want("materialize", scratch=256, flops=2 * 8 * 2 * 3, rows=4, why=FIT),
        },
    ),
    # 2^16 numbers of 2 rows are 512 KiB, the most that waits under any budget.
    "the most that waits": (
        {"rows": 2, "lengths": (1, 1), "out": 2**16} | THERE,
        {16 * MIB: want("queue", scratch=MIB, flops=2 * 2**16 * 4, rows=2, why=WAIT)},
    ),
    "more than that": (
        {"rows": 2, "lengths": (1, 1), "out": 2**16 + 1} | THERE,
        {16 * MIB: want("materialize", scratch=MIB + 16, flops=2 * (2**16 + 1) * 4, rows=2, why=FIT)},
    ),
    # 6 rows of 15 f64: 720 bytes. Twice that is 1440 = 1462 - 22; a group of 3 rows alone is 360.
    "fit": (
        {"rows": 6, "lengths": (1, 1, 1), "out": 5, "inp": 3, "dtypes": (F64, F64)} | THERE,
        {
            1462: want("materialize", scratch=1440, flops=2 * 15 * 3 * 3, rows=6, why=FIT),
            1461: want("group_by_group", scratch=360, flops=2 * 15 * 3 * 3, rows=3, why=LARGE),
        },
    ),
    # 300 bytes wait: of 1762 as much is left as above, of 1761 less.
    "beside others": (
        {"rows": 6, "lengths": (1, 1, 1), "out": 5, "inp": 3, "dtypes": (F64, F64), "waiting": 300} | THERE,
        {
            1762: want("materialize", scratch=1440, flops=270, rows=6, why=FIT),
            1761: want("group_by_group", scratch=360, flops=270, rows=3, why=LARGE),
        },
    ),
}

REUSE = {"rows": 6, "lengths": (9, 9), "out": 5, "inp": 7, "can_reuse": True}


def reuse(scratch: int) -> dict[str, object]:
    return want("weight_grad_reuse", scratch=scratch, flops=0, rows=6, why="needs the sum of these gradients")


SHARED = {
    "all of it": (REUSE, {1000: reuse(1000)}),
    "beside what waits and is copied": (REUSE | {"waiting": 100, "copied": 30}, {1000: reuse(1000 - 100 - 30)}),
    "half at least": (REUSE | {"waiting": 700, "copied": 30}, {1000: reuse(1000 // 2 - 30)}),
    "a byte at least": (REUSE | {"waiting": 700, "copied": 600}, {1000: reuse(1)}),
    "kernels or not": (REUSE | {"has_kernels": True, "directions": 3}, {1000: reuse(1000)}),
}

SMALLER = "smaller than their factors, "
AT_ONCE = "the gradients of all rows fit at once"
SMALL = {"rows": 4, "lengths": (2, 5), "out": 4, "inp": 6}
SMALL_FLOPS = 2 * 4 * 6 * (2 + 5 + 2 * 2)
BIG = {"rows": 2, "lengths": (256, 256), "out": 512}


def small(reducer: str, scratch: int, why: str, flops: int = SMALL_FLOPS) -> dict[str, object]:
    return want(reducer, tile=(4, 6), scratch=scratch, flops=flops, rows=4, why=why)


FORMED = {
    # A gradient has 24 f32, 96 bytes, the longest row's factors 5·4(4 + 6) = 200, the shorter one's 80. All rows' are
    # 384 bytes, a quarter of 1536, and 768 with a copy.
    "small ones": (
        SMALL,
        {
            1536: small("queue", 768, SMALLER + "and so small"),
            1535: small("materialize", 768, SMALLER + "so they are formed"),
        },
    ),
    "directions": (
        SMALL | {"directions": 1},
        {1536: small("queue", 768, "and so small", 2 * 4 * 6 * (2 + 5 + 2 * 3))},
    ),
    # 200 bytes are copied: 980 leaves 780, of which tiles may take 768.
    "all rows at once": (
        SMALL | {"is_complete": True, "copied": 200},
        {
            980: small("outer", 768, AT_ONCE),
            979: small("materialize", 768, SMALLER + "so they are formed"),
        },
    ),
    # A tile may take what is copied as well: rows are scaled one by one then.
    "all rows at once, most of it copied": (
        SMALL | {"is_complete": True, "has_factors": True, "copied": 775},
        {1555: small("outer", 768, AT_ONCE)},
    ),
    "no room at all": (
        SMALL | {"is_complete": True, "copied": 1535},
        {1535: small("materialize", 768, SMALLER + "so they are formed")},
    ),
    "kernels without directions": (
        SMALL | {"has_kernels": True, "directions": 1},
        {1536: small("queue", 768, "of their size; in torch, since", 2 * 4 * 6 * (2 + 5 + 2 * 3))},
    ),
    "kernels, rows to come": (
        SMALL | {"has_kernels": True},
        {
            1536: small("queue", 768, SMALLER + "so they are formed"),
            1535: small("materialize", 768, SMALLER + "so they are formed"),
        },
    ),
    # u is widened first, 5 tokens of 4 numbers a row: 4·4(2·24 + 5·4).
    "widened": (SMALL | {"dtypes": (BF16, F32)}, {2**12: small("queue", 1088, "and so small")}),
    "widened, the other": (SMALL | {"dtypes": (F32, BF16)}, {2**12: small("queue", 1248, "and so small")}),
    "to f64": (SMALL | {"dtypes": (F64, F32)}, {2**13: small("queue", 4 * 8 * (2 * 24 + 5 * 6), "and so small")}),
    # Twice 2^18 f32 of 2 rows are 4 MiB, the most that a CPU forms at once; a gradient is as large as its factors,
    # 256·4(512 + 512). 2 MiB do not wait, though they are less than a quarter of the budget.
    "as large": (
        BIG | {"inp": 512},
        {
            16 * MIB: want(
                "materialize",
                tile=(512, 512),
                scratch=4 * MIB,
                flops=2 * 2**18 * (512 + 4),
                rows=2,
                why=SMALLER + "so they are formed",
            )
        },
    ),
    "as large, factors held": (
        BIG | {"inp": 512, "has_factors": True},
        {
            16 * MIB: want(
                "group_by_group",
                tile=(512, 512),
                depth=256,
                scratch=2 * MIB,
                flops=2 * 2**18 * (512 + 4),
                rows=2,
                why="outer is the cheaper form, in tiles",
            )
        },
    ),
    "too large for a CPU": (
        BIG | {"inp": 513, "lengths": (257, 257)},
        {
            16 * MIB: want(
                "group_by_group",
                tile=(512, 513),
                depth=257,
                scratch=2 * 4 * 512 * 513,
                flops=2 * 512 * 513 * (514 + 4),
                rows=2,
                why="outer is the cheaper form, in tiles",
            )
        },
    ),
    "not for a GPU": (
        BIG | {"inp": 513, "lengths": (257, 257), "device": "cuda"},
        {
            16 * MIB: want(
                "materialize",
                tile=(512, 513),
                scratch=2 * 2 * 4 * 512 * 513,
                flops=2 * 512 * 513 * (514 + 4),
                rows=2,
                why=SMALLER + "so they are formed",
            )
        },
    ),
}

# Of 3 tokens and 8 by 8 a gradient is 256 bytes, its factors 192: gram 2·16(9 + 9 + 9) flops, outer 2·64(6 + 4).
GRAM: Given = {"rows": 2, "lengths": (3, 3), "out": 8, "inp": 8}
GRAM_WANT = want(
    "group_by_group",
    form="gram",
    tile=(3, 3),
    depth=8,
    scratch=2 * 4 * 9,
    flops=2 * 16 * 27,
    rows=2,
    why="gram is the cheaper form, in tiles of one group",
)
WEIGHED = "a preconditioner needs the gradients' own entries"

TILED = {
    "gram": (GRAM, {4096: GRAM_WANT}),
    "gram beside what is copied": (GRAM | {"copied": 4090}, {4096: GRAM_WANT}),
    "gram though all is here": (GRAM | {"is_complete": True}, {4096: GRAM_WANT}),
    # A tile a row, and one of the preconditioner; outer is the only form then.
    "weighted": (
        GRAM | {"is_weighted": True},
        {
            4096: want(
                "group_by_group", tile=(8, 8), depth=3, scratch=3 * 4 * 64, flops=2 * 64 * 10, rows=2, why=WEIGHED
            )
        },
    ),
    # Two tiles of 20 by 10 and 128 tokens of both sides, widened.
    "widened": (
        {"rows": 2, "lengths": (200, 150), "out": 20, "inp": 10, "dtypes": (F32, BF16), "has_factors": True},
        {
            2**20: want(
                "group_by_group",
                tile=(20, 10),
                depth=128,
                scratch=4 * (2 * 200 + 128 * 30),
                flops=2 * 200 * (350 + 4),
                rows=2,
                why="outer is the cheaper form",
            )
        },
    ),
}

TABLES = {
    "there already": THERE_ALREADY,
    "shared": SHARED,
    "formed": FORMED,
    "tiled": TILED,
}
ROWS = [pytest.param(*row, id=f"{table}: {name}") for table, rows in TABLES.items() for name, row in rows.items()]


@pytest.mark.parametrize(("given", "wanted"), ROWS)
def test_every_field(given: Given, wanted: Wanted) -> None:
    check(given, wanted)


def test_the_tiling_alone() -> None:
    tiling = decide(Product(**GRAM), 4096).tiling
    assert tiling == Tiling(form="gram", tile=(3, 3), depth=8, flops=2 * 16 * 27, scratch=2 * 4 * 9)
