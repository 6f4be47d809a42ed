"""What an audit left in its directory, read once: the summary, and tables as arrays by checkpoint.

Letters: P pairs of a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.record import CASE_NAMES, Summary, read_modules, read_pairs, read_sample, read_summary, read_tokens
from gradent.record.curves import mean_and_error

__all__ = ["AuditRecords", "Measured", "read_audit"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """The pairs of one checkpoint."""

    name: str  # of the checkpoint
    step: int  # of the trainer
    # figures by name of the column of `pairs.parquet`, `[P]` each; nan where there is none. `pair` as well
    columns: dict[str, Floats]

    @property
    def pairs(self) -> list[int]:
        """Rows of the data, `[P]`."""
        return [int(pair) for pair in self.columns["pair"]]

    def mean(self, name: str) -> float:
        """Mean of a column over the pairs that have a value; nan without any."""
        return mean_and_error(self.columns[name])[0]

    def error(self, name: str) -> float:
        """Standard error of that mean; inf for a single pair."""
        return mean_and_error(self.columns[name])[1]

    def quantile(self, name: str, share: float) -> float:
        """A quantile of a column; nan without any value."""
        there = self.columns[name][np.isfinite(self.columns[name])]
        return float(np.quantile(there, share)) if there.size else float("nan")

    def share(self, case: str) -> float:
        """Share of the pairs in a case, by its name; nan without any pair."""
        number = next(number for number, name in CASE_NAMES.items() if name == case)
        cases = self.columns["case"]
        return float((cases == number).mean()) if cases.size else float("nan")


@dataclass(frozen=True)
class AuditRecords:
    """Everything that a report of an audit reads."""

    directory: Path  # of the records
    summary: Summary  # `summary.json`
    measured: Sequence[Measured]  # the checkpoints, by step
    sample: dict[int, dict[str, Any]]  # rows of `sample.parquet` by pair; empty without the file
    modules: dict[str, list[Any]] | None  # columns of `modules.parquet`; None without the file
    tokens: dict[str, list[Any]] | None  # columns of `tokens.parquet`; None without the file

    @cached_property
    def name(self) -> str:
        """What was audited: the run's directory, or the checkpoint."""
        run = self.summary["run"]
        return str((run or {}).get("directory") or self.summary["model"].get("checkpoint") or self.directory.name)

    @property
    def first(self) -> Measured | None:
        """The first checkpoint; None where none was measured."""
        return self.measured[0] if self.measured else None

    @property
    def last(self) -> Measured | None:
        """The last checkpoint; None where none was measured."""
        return self.measured[-1] if self.measured else None

    @property
    def steps(self) -> list[float]:
        """The measured steps."""
        return [float(each.step) for each in self.measured]


def read_audit(directory: str | os.PathLike[str]) -> AuditRecords:
    """Read an audit's records."""
    place = Path(directory)
    summary = read_summary(place / "summary.json")
    columns = read_pairs(place / "pairs.parquet").to_pydict()
    sample = _optional(place / "sample.parquet", read_sample)
    rows: dict[int, dict[str, Any]] = {}
    if sample is not None:
        names = list(sample)
        rows = {values[0]: dict(zip(names, values, strict=True)) for values in zip(*sample.values(), strict=True)}
    return AuditRecords(
        directory=place,
        summary=summary,
        measured=_by_checkpoint(columns),
        sample=rows,
        modules=_optional(place / "modules.parquet", read_modules),
        tokens=_optional(place / "tokens.parquet", read_tokens),
    )


def _optional(path: Path, read: Any) -> dict[str, list[Any]] | None:
    return read(path).to_pydict() if path.exists() else None


def _by_checkpoint(columns: dict[str, list[Any]]) -> list[Measured]:
    """Split by checkpoint, in the order of steps; pairs in increasing order."""
    values = {
        name: np.array([np.nan if value is None else value for value in column], dtype=np.float64)
        for name, column in columns.items()
        if name != "checkpoint"
    }
    rows: dict[tuple[int, str], list[int]] = {}
    for row, key in enumerate(zip(columns["step"], columns["checkpoint"], strict=True)):
        rows.setdefault(key, []).append(row)
    found = []
    for (step, name), places in sorted(rows.items(), key=lambda item: item[0][0]):
        at = np.array(places)
        at = at[np.argsort(values["pair"][at], kind="stable")]
        found.append(Measured(name, step, {column: each[at] for column, each in values.items()}))
    return found
