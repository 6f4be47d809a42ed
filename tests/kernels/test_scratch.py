"""The budget bounds what a reduction allocates, counted at every operator."""

from __future__ import annotations

import pytest
import torch

from gradent.hooks.forms import Rows
from gradent.hooks.ledger import Ledger
from gradent.kernels.reference import reduce_dense, reduce_flat
from tests.live import LiveBytes

# What a reduction needs besides its tiles: the float64 sums of runs, a few scalars.
SMALL = 16 * 1024

SHAPES = [
    (64, 64, 2048, 2048),
    (2048, 1500, 256, 16),
    (700, 600, 512, 384),
    (1500, 1500, 4096, 4096),
    (3, 700, 99, 99),
]


@pytest.mark.parametrize("budget", [2**19, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape: tuple[int, int, int, int], dtype: torch.dtype, budget: int) -> None:
    t_w, t_l, rows, cols = shape
    operands = [torch.randn(size).to(dtype) for size in ((t_w, rows), (t_w, cols), (t_l, rows), (t_l, cols))]
    with LiveBytes() as live:
        reduce_dense(*operands, budget=budget)
    assert 0 < live.peak <= budget + SMALL


def test_the_count_can_fail() -> None:
    operands = [torch.randn(100, 1000) for _ in range(4)]
    with LiveBytes() as live:
        reduce_flat(torch.stack([operands[0].T @ operands[1], operands[2].T @ operands[3]]).view(2, -1))
    assert live.peak >= 2 * 4 * 1000 * 1000


@pytest.mark.parametrize("budget", [2**16, 2**20])
def test_lookups(budget: int) -> None:
    ledger = Ledger(1, budget=budget)
    for row in (0, 1):
        ledger.add(0, row, (), Rows(torch.randint(5000, (500,)), torch.randn(500, 1024)))
    with LiveBytes() as live:
        ledger.finish(0)
    assert live.peak <= 2 * budget + SMALL, "the tile, and one side's columns in float32"
