"""Long runs in few columns: neighbouring steps joined, so that a figure of a thousand steps can be read and sent."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Bins", "Pace", "shorten"]

MOST_COLUMNS = 80
"""Of a figure over steps."""

MOST_SENDINGS = 50
"""Of a run's figures, beside the first and the last."""

_DIGITS = 5


class Bins:
    """Steps in order, joined by neighbours into at most `MOST_COLUMNS` columns of equally many."""

    def __init__(self, steps: Sequence[int], weights: Sequence[int] | None = None) -> None:
        size = max(1, math.ceil(len(steps) / MOST_COLUMNS))
        self.slices = [slice(start, start + size) for start in range(0, len(steps), size)]
        self._weights = [1] * len(steps) if weights is None else list(weights)
        groups = [steps[part] for part in self.slices]
        self.places = [shorten((group[0] + group[-1]) / 2) for group in groups]
        self.names = [f"step {group[0]}" if len(group) == 1 else f"steps {group[0]}-{group[-1]}" for group in groups]
        self.sizes = [sum(self._weights[part]) for part in self.slices]

    def mean(self, values: Sequence[float | None]) -> list[float]:
        """A value a column: the weighted mean of those that there are; nan for none."""
        means = []
        for part in self.slices:
            pairs = zip(values[part], self._weights[part], strict=False)
            known = [(value, weight) for value, weight in pairs if value is not None and value == value and weight]
            total = sum(weight for _, weight in known)
            means.append(shorten(sum(value * weight for value, weight in known) / total) if total else math.nan)
        return means


class Pace:
    """When figures are sent: at first, then at most `MOST_SENDINGS` times until a run's last step."""

    def __init__(self) -> None:
        self._sent: int | None = None

    def is_due(self, step: int, last: int) -> bool:
        """Whether figures are to be sent at a step of a run of `last` steps (0: of unknown length, always)."""
        if self._sent is not None and step - self._sent < last / MOST_SENDINGS:
            return False
        self._sent = step
        return True


def shorten(value: float) -> float:
    """A number with as many digits as a figure shows."""
    return float(f"{value:.{_DIGITS}g}")
