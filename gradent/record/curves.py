"""Rows of `pairs.parquet` as curves over steps.

Letters: S measured steps, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.errors import InputError
from gradent.record.table import Floats

__all__ = ["Curve", "mean_and_error", "read_curves"]


@dataclass(frozen=True)
class Curve:
    """One column of one checkpoint."""

    steps: NDArray[np.int64]  # int64 `[S]`, increasing
    values: Floats  # `[S, P]`, pairs in increasing order; nan where the column holds null

    @property
    def mean(self) -> Floats:
        """Mean over the pairs, `[S]`; nan where no pair has a value."""
        return np.array([mean_and_error(row)[0] for row in self.values])

    @property
    def error(self) -> Floats:
        """Standard error of that mean, `[S]`."""
        return np.array([mean_and_error(row)[1] for row in self.values])

    @property
    def change(self) -> Floats:
        """Last step minus first step, `[P]`."""
        return np.asarray(self.values[-1] - self.values[0])

    @property
    def since_start(self) -> Curve:
        """The same curve with each pair's value at the first step taken off."""
        return Curve(self.steps, self.values - self.values[:1])

    @property
    def over_steps(self) -> Floats:
        """Mean over the steps, `[P]`; nan for a pair without a value at some step."""
        return np.asarray(self.values.mean(0))


def mean_and_error(values: Floats) -> tuple[float, float]:
    """Mean and its standard error over pairs that have a value."""
    values = values[np.isfinite(values)]
    if values.size == 0:
        return float("nan"), float("nan")
    error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.inf
    return float(values.mean()), float(error)


def read_curves(columns: Mapping[str, Sequence[Any]], name: str) -> dict[str, Curve]:
    """The curves of one column, by checkpoint."""
    cells: dict[str, dict[tuple[int, int], float]] = {}
    rows = zip(columns["checkpoint"], columns["step"], columns["pair"], columns[name], strict=True)
    for checkpoint, step, pair, value in rows:
        table = cells.setdefault(str(checkpoint), {})
        if (step, pair) in table:
            raise InputError(f"{checkpoint}: pair {pair} occurs twice at step {step}.")
        table[step, pair] = float("nan") if value is None else float(value)
    return {checkpoint: _to_curve(checkpoint, table) for checkpoint, table in cells.items()}


def _to_curve(checkpoint: str, table: Mapping[tuple[int, int], float]) -> Curve:
    steps, pairs = sorted({step for step, _ in table}), sorted({pair for _, pair in table})
    if len(table) != len(steps) * len(pairs):
        raise InputError(
            f"{checkpoint}: {len(table)} rows for {len(steps)} steps of {len(pairs)} pairs; every pair must be "
            "there at every step."
        )
    values = [[table[step, pair] for pair in pairs] for step in steps]
    return Curve(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
