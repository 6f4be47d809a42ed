"""Bars of what moved each side, step by step: of chosen and rejected, or of positives and negatives."""

from __future__ import annotations

from collections.abc import Mapping

from gradent.figures.charts import Bars, Figure, Series
from gradent.report.live.bins import Bins

__all__ = ["MovedBars"]

_NONE = float("nan")


class MovedBars:
    """Keeps side -> source -> nats of each step, nan where a step has no account or not that source."""

    def __init__(self) -> None:
        self._moved: dict[str, dict[str, list[float]]] = {}

    def add(self, moved: Mapping[str, Mapping[str, list[float]]], steps: int) -> None:
        """Add a window's means, with which there are so many steps."""
        for side, columns in moved.items():
            for source, values in columns.items():
                known = self._moved.setdefault(side, {}).setdefault(source, [])
                known += [_NONE] * (steps - len(values) - len(known)) + values

    def figures(self, bins: Bins, kind: str = "") -> dict[str, Figure]:
        """A figure of each side over these steps; `kind` of rows stands behind the side's name."""
        return {
            f"gradent/moved_{side}": Bars(
                "step", "nats a step, first order", bins.names,
                [Series(source.replace("_", " "), bins.mean(values), source) for source, values in columns.items()],
                title=f"What moved {side}{kind}", upright=True, places=bins.places,
            )
            for side, columns in self._moved.items()
        }  # fmt: skip
