"""Columns of one length as arrays: the one form of a measurement's numbers, from the journal to the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Table", "ranks", "spearman", "stack"]

Floats = NDArray[np.float64]


class Table(dict[str, NDArray[Any]]):
    """Columns by name, `[rows]` each: float64 with nan where a number is missing, int64, bool, or texts as objects."""

    @classmethod
    def read(cls, columns: Mapping[str, Sequence[Any] | NDArray[Any]]) -> Table:
        """A table of lists or arrays; None stands for a missing number."""
        return cls({name: _to_array(values) for name, values in columns.items()})

    @property
    def rows(self) -> int:
        """Rows of each column."""
        return len(next(iter(self.values()), ()))

    def pick(self, names: Sequence[str]) -> Table:
        """Some of the columns, in this order."""
        return Table({name: self[name] for name in names})

    def select(self, rows: NDArray[Any]) -> Table:
        """The rows at these positions, or those that a mask marks."""
        return Table({name: values[rows] for name, values in self.items()})

    def to_lists(self) -> dict[str, list[Any]]:
        """Lists with None for a missing number, as parquet and JSON take them."""
        return {name: [None if value != value else value for value in values.tolist()] for name, values in self.items()}


def stack(tables: Sequence[Table]) -> Table:
    """The rows of tables with the same columns, one table after the other; at least one table."""
    return Table({name: np.concatenate([table[name] for table in tables]) for name in tables[0]})


def ranks(values: Floats) -> Floats:
    """Ranks from 1, ties at their average."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[which], dtype=np.float64)


def spearman(x: Floats, y: Floats) -> float | None:
    """Spearman's rank correlation of two columns, `[n]` each; None where one of them is constant or empty."""
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.clip(np.corrcoef(ranks(x), ranks(y))[0, 1], -1, 1))


def _to_array(values: Sequence[Any] | NDArray[Any]) -> NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values
    if any(isinstance(value, str) for value in values):
        return np.array(values, dtype=object)
    array = np.asarray(values)
    return array if array.dtype.kind in "bi" else np.asarray(values, dtype=np.float64)
