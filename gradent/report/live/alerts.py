"""The verdict in words, for the training log: said when it matters, quiet otherwise."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass

from gradent.errors import InputError
from gradent.report.live.window import Window

__all__ = ["DEFAULT_ALERT", "Alert", "Speaker", "describe"]

_NUMBERS = {"both_down": "case 2 (both fall)", "both_up": "case 3 (both rise)", "reversed": "case 4 (reversed)"}


@dataclass(frozen=True, kw_only=True)
class Alert:
    """When a window is worth a sentence.

    Attributes:
        both_down: share of pairs from which "both fall" is said.
        both_up: the same for "both rise".
        reversed: the same for chosen falling and rejected rising.
        layers: share of the inner product that the layers named must hold together.
        again: windows that must pass before the same is said again.

    Raises:
        InputError: a share outside of (0, 1], or `again` below 1.
    """

    both_down: float = 0.5
    both_up: float = 0.9
    reversed: float = 0.25
    layers: float = 2 / 3
    again: int = 10

    def __post_init__(self) -> None:
        for name in ("both_down", "both_up", "reversed", "layers"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"Alert: {name}={getattr(self, name)!r}; accepted is a share, 0 < share <= 1.")
        if self.again < 1:
            raise InputError(f"Alert: again={self.again!r}; accepted is a number of windows >= 1.")


DEFAULT_ALERT = Alert()


class Speaker:
    """Says what `describe` finds, and says the same thing only now and then.

    Args:
        alert: thresholds.
    """

    def __init__(self, alert: Alert) -> None:
        self._alert = alert
        self._seen = 0
        self._said: dict[str, int] = {}  # case -> the window at which it was said last

    def say(self, window: Window) -> str | None:
        """The sentence for a window.

        Args:
            window: the measured steps since the last one.

        Returns:
            A line, or None where there is nothing to say, or nothing new.
        """
        case = _worth_saying(window, self._alert)
        self._seen += 1
        if case is None or self._seen - self._said.get(case, -self._alert.again) < self._alert.again:
            return None
        self._said[case] = self._seen
        return describe(window, self._alert)


def describe(window: Window, alert: Alert) -> str | None:
    """What is wrong in a window, in one line.

    Args:
        window: measured steps.
        alert: thresholds.

    Returns:
        The line, or None where no threshold is reached.
    """
    case = _worth_saying(window, alert)
    if case is None:
        return None
    first, last = window.steps[0], window.steps[-1]
    steps = f"step {first}" if first == last else f"steps {first}-{last}"
    parts = [f"{steps}: {window.share(case):.0%} of {sum(window.pairs)} pairs in {_NUMBERS[case]}"]
    if case != "both_up" and window.chosen_needs:
        needs, ratio = statistics.median(window.chosen_needs), statistics.median(window.weight_ratio)
        parts.append(f"chosen would rise if d_w/d_l ≥ {needs:.2g} (median; it is {ratio:.2g})")
    where = _layers(window, alert.layers)
    if where is not None:
        parts.append(where)
    return "; ".join(parts)


def _worth_saying(window: Window, alert: Alert) -> str | None:
    if not sum(window.pairs):
        return None
    shares = {case: window.share(case) / getattr(alert, case) for case in ("reversed", "both_down", "both_up")}
    case = max(shares, key=lambda name: shares[name])
    return case if shares[case] >= 1 else None


def _layers(window: Window, least: float) -> str | None:
    """The shortest run of numbered layers that holds a share of the inner product."""
    total = sum(window.layer_inner.values())
    numbered: dict[int, float] = {}
    for layer, inner in window.layer_inner.items():
        match = re.search(r"\.(\d+)$", layer)
        if match:
            numbered[int(match[1])] = numbered.get(int(match[1]), 0.0) + inner
    if total <= 0 or not numbered:
        return None
    order = sorted(numbered)
    runs = [(stop - start, start, stop) for start in range(len(order)) for stop in range(start + 1, len(order) + 1)]
    for _, start, stop in sorted(runs):
        share = sum(numbered[number] for number in order[start:stop]) / total
        if share >= least:
            name = (
                f"layer {order[start]} holds" if stop == start + 1 else f"layers {order[start]}-{order[stop - 1]} hold"
            )
            return f"{name} {share:.0%} of the inner product"
    return None
