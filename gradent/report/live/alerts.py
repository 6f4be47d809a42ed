"""What a step did, in words, for the training log: a sentence when it matters, nothing otherwise.

The sentence leads with what moved chosen or rejected in the last measured step, by source; behind it stands the verdict
of Conditions 1 and 2, which is about each pair alone under plain gradient descent.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from dataclasses import dataclass

from gradent.errors import InputError
from gradent.report.live.window import Window

__all__ = ["DEFAULT_ALERT", "FIRST_TOLD", "Alert", "Alerter", "describe"]

FIRST_TOLD = 5
"""Adam's second moment is an average of too few gradients before this step for its account to be told in words."""

_PARTNER = {"chosen": "rejected partner", "rejected": "chosen partner"}
_LEAST_PART = 0.01
"""Of the largest: a source below it is not listed."""
_CASES = {"both_down": "case 2 (both fall)", "both_up": "case 3 (both rise)", "reversed": "case 4 (reversed)"}


@dataclass(frozen=True, kw_only=True)
class Alert:
    """When a window is worth a sentence.

    Attributes:
        chosen_falls: nats by which a step lowers chosen on average, to first order, above which that is said.
        both_down: share of pairs from which "both fall" is said.
        both_up: the same for "both rise".
        reversed: the same for chosen falling and rejected rising.
        positive_lowered: of rows that are no pairs, share of those with a positive weight that steps lower, to first
            order, from which that is said.
        layers: share of the inner product that the layers named must hold together.
        again: windows that must pass before the same is said again.

    Raises:
        InputError: a share outside of (0, 1], or `again` below 1.
    """

    chosen_falls: float = 0.0
    both_down: float = 0.5
    both_up: float = 0.9
    reversed: float = 0.25
    positive_lowered: float = 0.25
    layers: float = 2 / 3
    again: int = 10

    def __post_init__(self) -> None:
        for name in ("both_down", "both_up", "reversed", "positive_lowered", "layers"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"Alert: {name}={getattr(self, name)!r}; accepted is a share, 0 < share <= 1.")
        if self.chosen_falls < 0:
            raise InputError(f"Alert: chosen_falls={self.chosen_falls!r}; accepted is a number of nats >= 0.")
        if self.again < 1:
            raise InputError(f"Alert: again={self.again!r}; accepted is a number of windows >= 1.")


DEFAULT_ALERT = Alert()


class Alerter:
    """Describes window after window, and the same only now and then."""

    def __init__(self, alert: Alert) -> None:
        self._alert = alert
        self._windows = 0
        self._last: dict[str, int] = {}  # news -> number of the window that it was last described in

    def check(self, window: Window) -> str | None:
        """The line for a window; None where no threshold is reached, or all of it was described not long ago."""
        news = _find_news(window, self._alert)
        self._windows += 1
        again = self._alert.again
        if all(self._windows - self._last.get(each, -again) < again for each in news):
            return None
        self._last |= dict.fromkeys(news, self._windows)
        return describe(window, self._alert)


def describe(window: Window, alert: Alert) -> str | None:
    """What is wrong in a window, in one line; None where no threshold is reached."""
    if not _find_news(window, alert):
        return None
    parts = [_describe_step(window), _describe_pairs(window, alert)]
    return "; ".join(part for part in parts if part)


def _describe_step(window: Window) -> str:
    """What moved both sides in the window's last step that has an account; empty where none has."""
    place = _find_step(window)
    if place is None:
        return ""
    sides = "; ".join(_describe_side(side, window.moved_last(side)) for side in ("chosen", "rejected"))
    explained = "" if window.explained is None else f"; {max(0.0, window.explained):.0%} explained"
    partial = "" if window.is_whole else "; without later micro-batches, other ranks and rows that have no partner"
    return f"step {window.steps[place]}: {sides}{explained}{partial}"


def _find_step(window: Window) -> int | None:
    """Place of the step that is told of; None for none, and in a run's first steps."""
    place = window.last_accounted
    return None if place is None or window.steps[place] < FIRST_TOLD else place


def _describe_side(side: str, moved: dict[str, float]) -> str:
    if "own" not in moved:  # a step that is not split
        return f"{side} {sum(moved.values()):+.2g} nats"
    named = {
        "own": moved["own"], _PARTNER[side]: moved["partner"], "momentum": moved["momentum"],
        "other pairs": moved["others_chosen"] + moved["others_rejected"] + moved["earlier_batches"],
        "weight decay": moved["weight_decay"],
    }  # fmt: skip
    least = _LEAST_PART * max(map(abs, named.values()))
    parts = sorted((value, name) for name, value in named.items() if value and abs(value) >= least)
    listed = ", ".join(f"{name} {value:+.2g}" for value, name in parts)
    return f"{side} {sum(moved.values()):+.2g} nats ({listed})"


def _describe_pairs(window: Window, alert: Alert) -> str:
    """The verdict of each pair alone; empty where no threshold is reached."""
    case = _worst_case(window, alert)
    if case is None:
        return ""
    first, last = window.steps[0], window.steps[-1]
    steps = f"step {first}" if first == last else f"steps {first}-{last}"
    share = f"{window.share(case):.0%} of {sum(window.pairs)} pairs in {_CASES[case]}"
    parts = [f"{steps}: {share}, each pair alone under plain gradient descent"]
    if case != "both_up" and window.chosen_needs:
        needs, ratio = statistics.median(window.chosen_needs), statistics.median(window.weight_ratio)
        parts.append(f"chosen would rise if d_w/d_l ≥ {needs:.2g} (median; it is {ratio:.2g})")
    layers = _find_layers(window, alert.layers)
    if layers is not None:
        parts.append(layers)
    return "; ".join(parts)


def _find_news(window: Window, alert: Alert) -> list[str]:
    """What a window has that is worth a sentence: that a step lowers chosen, and its case."""
    case = _worst_case(window, alert)
    falls = (
        _find_step(window) is not None
        and window.is_whole
        and sum(window.moved_last("chosen").values()) < -alert.chosen_falls
    )
    return [*(["chosen falls"] if falls else []), *([] if case is None else [case])]


def _worst_case(window: Window, alert: Alert) -> str | None:
    """The case that is furthest beyond its threshold; None where none is."""
    if not sum(window.pairs):
        return None
    shares = {case: window.share(case) / getattr(alert, case) for case in ("reversed", "both_down", "both_up")}
    case = max(shares, key=lambda name: shares[name])
    return case if shares[case] >= 1 else None


def _find_layers(window: Window, least: float) -> str | None:
    """The shortest run of numbered layers that holds a share of the inner product, in words."""
    total = sum(window.layer_inner.values())
    inner: dict[int, float] = defaultdict(float)
    for layer, value in window.layer_inner.items():
        match = re.search(r"\.(\d+)$", layer)
        if match:
            inner[int(match[1])] += value
    numbers = sorted(inner) if total > 0 else []
    for length in range(1, len(numbers) + 1):
        for start in range(len(numbers) - length + 1):
            run = numbers[start : start + length]
            share = sum(inner[number] for number in run) / total
            if share >= least:
                name = f"layer {run[0]} holds" if length == 1 else f"layers {run[0]}-{run[-1]} hold"
                return f"{name} {share:.0%} of the inner product"
    return None
