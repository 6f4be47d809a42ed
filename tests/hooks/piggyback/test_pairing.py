"""Which rows of a forward are chosen, which rejected, and which belong together."""

from __future__ import annotations

import pytest
import torch

from gradent.hooks.piggyback.pairing import pair_rows

C = torch.tensor([-1.0, 2.0, -3.0, 4.0, -5.0, 6.0])


@pytest.mark.parametrize(
    ("pairing", "rows"),
    [
        ("halves", [0, 1, 2, 3, 4, 5]),
        ("thirds", [0, 1, 2, 3]),
        ("either", [0, 4, 2, 3, 1, 5]),  # of rows 1 and 4 the loss wants 4 up
        ("signs", [0, 2, 4, 1, 3, 5]),
    ],
)
def test_rows(pairing: str, rows: list[int]) -> None:
    assert pair_rows(pairing, C) == rows


def test_signs_leave_out_what_finds_no_partner() -> None:
    assert pair_rows("signs", torch.tensor([1.0, 0.0, 2.0, -1.0, 3.0])) == [3, 0]
    assert pair_rows("signs", torch.tensor([1.0, 2.0])) == []


def test_either_keeps_the_order_where_nothing_is_wanted() -> None:
    assert pair_rows("either", torch.zeros(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("pairing", "rows"), [("halves", 3), ("either", 5), ("thirds", 4)])
def test_blocks_of_one_size(pairing: str, rows: int) -> None:
    found = pair_rows(pairing, torch.ones(rows))
    assert isinstance(found, str) and f"{rows} rows" in found
