"""How well each rung of the ladder ranks what it stands in for: rank correlations, with intervals by bootstrap.

Every value is turned so that more is worse: more entangled, or chosen falling more. A correlation of 1 is then a rung
that ranks the pairs as the exact value does, 0 one that knows nothing of it.

Letters: P pairs of the exact sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradent.auditing.analysis.properties import FEWEST
from gradent.record.table import Floats, Table, spearman
from gradent.scanning.rungs import RUNGS, TARGETS

__all__ = ["RESAMPLES", "grade"]

RESAMPLES = 1000


def grade(table: Table, costs: Mapping[str, float | None], seed: int) -> list[dict[str, Any]]:
    """A row a rung, from the rows of `scan.parquet` of the exact sample and the costs of each part, seconds a pair."""
    if table.rows < FEWEST:
        return []
    harms = {rung.name: rung.harm(table) for rung in RUNGS}
    values = {name: value for name, value in harms.items() if value is not None}
    goals = {name: target.harm(table) for name, target in TARGETS.items()}
    chance = np.random.default_rng(seed)
    draws = [chance.integers(0, table.rows, table.rows) for _ in range(RESAMPLES)]
    return [
        {
            "rung": rung.name, "label": rung.label, "pairs": table.rows, "cost": rung.cost(costs),
            **{name: _correlate(values[rung.name], goal, draws, rung is TARGETS[name]) for name, goal in goals.items()},
        }
        for rung in RUNGS if rung.name in values
    ]  # fmt: skip


def _correlate(value: Floats, goal: Floats | None, draws: list[Any], is_itself: bool) -> dict[str, float | None]:
    nothing: dict[str, float | None] = {"spearman": None, "low": None, "high": None}
    if goal is None or is_itself:
        return nothing
    whole = _of_both(value, goal)
    if whole is None:
        return nothing
    found = [_of_both(value[draw], goal[draw]) for draw in draws]
    known = [rho for rho in found if rho is not None]
    low, high = np.percentile(known, [2.5, 97.5])
    return {"spearman": whole, "low": float(low), "high": float(high)}


def _of_both(x: Floats, y: Floats) -> float | None:
    """Spearman's ρ of the pairs that have both."""
    both = np.isfinite(x) & np.isfinite(y)
    return spearman(x[both], y[both])
