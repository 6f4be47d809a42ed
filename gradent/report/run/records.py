"""What a run's records hold, for its page: both sides' changes by source, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.errors import DataFileError
from gradent.record import GROUP_SOURCES, MOVED_SOURCES, UNSPLIT
from gradent.record.stream import read_row_stream, read_stream

__all__ = ["FILES", "RunRecords", "Side", "find_files", "read_run"]

Floats = NDArray[np.float64]
Columns = dict[str, list[Any]]

FILES = ("pairs.jsonl", "rows.jsonl")
_COUNTED_FROM = 5
"""Adam's second moment is an average of too few gradients before this step for its account to be counted."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of every row or pair in the order of the records: chosen, rejected, positives or negatives."""

    name: str
    steps: NDArray[np.int64]
    realised: Floats  # nats by which the optimizer's step moved each; nan where not measured
    moved: dict[str, Floats]  # source -> nats to first order; nan where the step has no account

    @property
    def total(self) -> Floats:
        """What all sources together move, nan where none is known."""
        columns = np.array(list(self.moved.values())) if self.moved else np.full((1, len(self.steps)), np.nan)
        return np.where(np.isnan(columns).all(0), np.nan, np.nansum(columns, 0))

    @property
    def is_realised(self) -> bool:
        """Whether real changes were measured."""
        return bool(np.isfinite(self.realised).any())

    @property
    def change(self) -> Floats:
        """Real changes where they were measured, else those of the account, but for a run's first steps."""
        if self.is_realised:
            return self.realised
        return np.where(self.steps < _COUNTED_FROM, np.nan, self.total)

    def since(self, step: int) -> Side:
        """The same from a step on."""
        keep = self.steps >= step
        moved = {source: values[keep] for source, values in self.moved.items()}
        return Side(name=self.name, steps=self.steps[keep], realised=self.realised[keep], moved=moved)


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """A run's records: two sides, and the columns that its page draws."""

    path: Path
    sides: tuple[Side, Side]
    columns: Columns = field(repr=False)
    steps: Sequence[int] = ()  # that were measured, in order
    rows: int = 0

    @property
    def has_pairs(self) -> bool:
        """Whether rows are pairs."""
        return self.path.name == FILES[0]

    def column(self, name: str) -> Floats:
        """A column, nan for None."""
        return _floats(self.columns[name])


def find_files(directory: Path) -> list[Path]:
    """The files of records in a directory."""
    return [directory / name for name in FILES if (directory / name).is_file()]


def read_run(path: Path) -> RunRecords:
    """The records of one file, also while it is being written."""
    columns = (read_stream if path.name == FILES[0] else read_row_stream)(path)
    numbers = columns["step"]
    if any(not isinstance(step, int) for step in numbers):
        raise DataFileError(f"{path}: a step in it is not a whole number.")
    steps = np.array(numbers, dtype=np.int64)
    sides = _pair_sides(columns, steps) if path.name == FILES[0] else _row_sides(columns, steps)
    return RunRecords(
        path=path, sides=sides, columns=columns, steps=sorted(set(numbers)), rows=len(numbers)
    )  # fmt: skip


def _pair_sides(columns: Columns, steps: NDArray[np.int64]) -> tuple[Side, Side]:
    chosen, rejected = (
        Side(
            name=name, steps=steps, realised=_floats(columns[f"{name}_realised"]),
            moved=_known({s: columns[f"{name}_moved_{s}"] for s in (*MOVED_SOURCES, UNSPLIT)}),
        )
        for name in ("chosen", "rejected")
    )  # fmt: skip
    return chosen, rejected


def _row_sides(columns: Columns, steps: NDArray[np.int64]) -> tuple[Side, Side]:
    weight, realised = _floats(columns["weight"]), _floats(columns["realised"])
    moved = _known({source: columns[f"moved_{source}"] for source in (*GROUP_SOURCES, UNSPLIT)})
    positives, negatives = (
        Side(
            name=name, steps=steps[keep], realised=realised[keep],
            moved={source: values[keep] for source, values in moved.items()},
        )
        for name, keep in (("positives", weight > 0), ("negatives", weight < 0))
    )  # fmt: skip
    return positives, negatives


def _known(columns: Columns) -> dict[str, Floats]:
    """The sources that some step has."""
    found = {source: _floats(values) for source, values in columns.items()}
    return {source: values for source, values in found.items() if np.isfinite(values).any()}


def _floats(values: Sequence[Any]) -> Floats:
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)
