"""What an audit left in its directory, read once: the summary, and tables as arrays by checkpoint.

Letters: P pairs of a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradent.figures.charts import Line
from gradent.record import CASE_NAMES, Summary, read_modules, read_pairs, read_sample, read_summary, read_tokens
from gradent.record.curves import mean_and_error
from gradent.record.table import Floats, Table
from gradent.report.page.unit import StepUnit

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["AuditRecords", "Measured", "Row", "read_audit"]

Row = Mapping[str, Any]
_CASES = {name: number for number, name in CASE_NAMES.items()}


@dataclass(frozen=True)
class Measured:
    """The pairs of one checkpoint."""

    name: str
    step: int
    columns: Table  # of `pairs.parquet`, `[P]` each, `pair` among them; nan where there is no value

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

    def finite(self, name: str) -> Floats:
        """The values of a column that are there."""
        values = self.columns[name]
        return np.asarray(values[np.isfinite(values)], dtype=np.float64)

    def quantile(self, name: str, share: float) -> float:
        """A quantile of a column; nan without any value."""
        values = self.finite(name)
        return float(np.quantile(values, share)) if values.size else float("nan")

    def is_case(self, name: str) -> NDArray[np.bool_]:
        """Which pairs are in a case, `[P]`."""
        return np.asarray(self.columns["case"] == _CASES[name])

    def share(self, case: str) -> float:
        """Share of the pairs in a case, by its name; nan without any pair."""
        return float(self.is_case(case).mean()) if len(self.columns["case"]) else float("nan")

    def case_of(self, place: int) -> str:
        """The name of a pair's case."""
        return CASE_NAMES[int(self.columns["case"][place])]


@dataclass(frozen=True)
class AuditRecords:
    """Everything that a report of an audit reads."""

    directory: Path
    summary: Summary
    measured: Sequence[Measured]  # the checkpoints, by step
    sample: Mapping[int, Row]  # rows of `sample.parquet` by pair; empty without the file
    modules: Sequence[Row] | None  # rows of `modules.parquet`; None without the file
    tokens: Sequence[Row] | None  # rows of `tokens.parquet`; None without the file
    unit: StepUnit  # of what one step does

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
        return [float(measured.step) for measured in self.measured]

    def of_dynamics(self, key: str) -> Row:
        """A part of the summary's dynamics: `onset`, `start`, ...; empty where there is none."""
        return (self.summary["dynamics"] or {}).get(key) or {}

    @property
    def logged(self) -> Mapping[str, Sequence[Sequence[float | None]]]:
        """Curves of the trainer's log, `{key: [[step, value], ...]}`."""
        return (self.summary["history"] or {}).get("curves") or {}

    def mean_line(self, column: str, name: str) -> Line:
        """Means of a column over steps, with their standard errors."""
        statistics = [(measured.mean(column), measured.error(column)) for measured in self.measured]
        means, errors = zip(*statistics, strict=True) if statistics else ((), ())
        return Line(name, self.steps, list(means), list(errors))

    def quartile_line(self, column: str, name: str) -> Line:
        """Medians of a column over steps, in a band of its quartiles."""
        quartiles = [[measured.quantile(column, share) for measured in self.measured] for share in (0.25, 0.5, 0.75)]
        return Line(name, self.steps, quartiles[1], low=quartiles[0], high=quartiles[2])


def read_audit(directory: str | os.PathLike[str], lr: float | None = None) -> AuditRecords:
    """Read the records of an audit; `sample.parquet`, `modules.parquet` and `tokens.parquet` may be missing.

    Args:
        directory: of the audit.
        lr: learning rate at which steps are shown. Default: that of the record, or nats per unit of it.

    Returns:
        The records.
    """
    place = Path(directory)
    summary = read_summary(place / "summary.json")
    measured = _by_checkpoint(read_pairs(place / "pairs.parquet"))
    sample = {row["pair"]: row for row in _rows(place / "sample.parquet", read_sample) or []}
    modules, tokens = _rows(place / "modules.parquet", read_modules), _rows(place / "tokens.parquet", read_tokens)
    unit = StepUnit.of(summary["settings"], lr)
    return AuditRecords(place, summary, measured, sample, modules, tokens, unit)


def _rows(path: Path, read: Callable[[Path], Any]) -> list[Row] | None:
    return read(path).to_pylist() if path.exists() else None


def _by_checkpoint(table: pa.Table) -> list[Measured]:
    """Split by checkpoint, in the order of steps; pairs in increasing order."""
    names = [name for name in table.column_names if name != "checkpoint"]
    columns = Table({name: table[name].cast("float64").to_numpy() for name in names})
    rows: dict[tuple[int, str], list[int]] = {}
    for row, key in enumerate(zip(table["step"].to_pylist(), table["checkpoint"].to_pylist(), strict=True)):
        rows.setdefault(key, []).append(row)
    checkpoints = []
    for (step, name), places in sorted(rows.items(), key=lambda item: item[0][0]):
        part = columns.select(np.array(places))
        checkpoints.append(Measured(name, step, part.select(np.argsort(part["pair"], kind="stable"))))
    return checkpoints
