"""Rows to curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradent.errors import InputError
from gradent.record.curves import mean_and_error, read_curves

ROWS = {
    "checkpoint": ["b", "b", "b", "b", "a", "a"],
    "step": [10, 0, 10, 0, 0, 0],
    "pair": [1, 0, 0, 1, 3, 7],
    "cosine": [0.4, 0.1, 0.2, None, 1.0, 0.0],
}


def test_rows_in_any_order_become_curves():
    curves = read_curves(ROWS, "cosine")
    assert list(curves) == ["b", "a"]
    assert curves["b"].steps.tolist() == [0, 10]
    np.testing.assert_array_equal(curves["b"].values, [[0.1, np.nan], [0.2, 0.4]])
    np.testing.assert_allclose(curves["b"].mean, [0.1, 0.3])
    np.testing.assert_allclose(curves["b"].change, [0.1, np.nan])
    np.testing.assert_allclose(curves["b"].since_start.values[0], [0, np.nan])
    np.testing.assert_allclose(curves["a"].over_steps, [1.0, 0.0])


def test_mean_and_error():
    mean, error = mean_and_error(np.array([1.0, 2.0, 3.0, np.nan]))
    assert (mean, error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_and_error(np.array([2.0])) == (2.0, math.inf)
    assert all(map(math.isnan, mean_and_error(np.array([np.nan]))))


def test_a_missing_pair_is_refused():
    with pytest.raises(InputError, match="3 rows for 2 steps of 2 pairs"):
        read_curves({name: column[:3] for name, column in ROWS.items()}, "cosine")


def test_a_pair_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        read_curves({name: [*column, column[0]] for name, column in ROWS.items()}, "cosine")
