"""Columns as arrays: what is missing, whole numbers, switches and texts come back as they were."""

from __future__ import annotations

import numpy as np
import pytest

from gradent.record.table import Table, stack

COLUMNS = {
    "pair": [3, 1, 2],
    "cosine": [0.5, None, -1.0],
    "nothing": [None, None, None],
    "identical": [True, False, True],
    "token": ["a\x00", "\ud800", ""],
}


def test_lists_come_back() -> None:
    table = Table.read(COLUMNS)
    assert table.to_lists() == COLUMNS and table.rows == 3
    assert [table[name].dtype.kind for name in COLUMNS] == ["i", "f", "f", "b", "O"]
    assert np.isnan(table["cosine"][1]) and Table.read(table)["pair"] is table["pair"]


def test_rows_are_picked_and_put_together() -> None:
    table = Table.read(COLUMNS)
    order = np.argsort(table["pair"])
    sorted_ = table.select(order)
    assert sorted_["pair"].tolist() == [1, 2, 3] and sorted_["token"].tolist() == ["\ud800", "", "a\x00"]
    parts = [table.select(table["pair"] > 1), table.select(table["pair"] == 1)]
    assert stack(parts).select(np.array([0, 2, 1])).to_lists() == COLUMNS
    assert Table.read({}).rows == 0


@pytest.mark.parametrize("values", [[], [None]])
def test_what_holds_no_number_is_a_column_of_numbers(values) -> None:
    assert Table.read({"a": values})["a"].dtype == np.float64
