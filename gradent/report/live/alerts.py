"""What a step did, in words, for the training log: a sentence when it matters, nothing otherwise.

The sentence leads with what moved chosen and rejected in the window's measured steps, by source; behind it stands the
verdict of Conditions 1 and 2, which is about each pair alone under plain gradient descent.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from gradent.errors import InputError
from gradent.report.live.window import Window

__all__ = ["DEFAULT_ALERT", "FIRST_TOLD", "Alert", "Alerter", "describe"]

FIRST_TOLD = 5
"""Adam's second moment is an average of too few gradients before this step for its account to be told in words."""

_PARTNER = {"chosen": "rejected partner", "rejected": "chosen partner"}
_LEAST_PART = 0.01
"""Of the largest: a source below it is not listed."""
_CLEARLY = 2.0
"""Standard errors from which a mean is said to fall."""
_TERM_EXPLAINED = 0.9
"""Share of the realised changes that the account must explain before a weight is told from it."""
_MOST_DIGITS = 6
_CASES = {"both_down": "case 2 (both fall)", "both_up": "case 3 (both rise)", "reversed": "case 4 (reversed)"}


@dataclass(frozen=True, kw_only=True)
class Alert:
    """When a window is worth a sentence.

    Attributes:
        pairs: pairs (of rows that are no pairs: positives) below which a window says nothing; it is joined with those
            that follow until it has as many.
        explained: where realised changes are measured, the share of them that the account must explain for a fall to
            be said.
        chosen_falls: nats by which a step lowers chosen on average, to first order, above which that is said; it must
            also be more than two standard errors over the pairs.
        both_down: share of pairs from which "both fall" is said.
        both_up: the same for "both rise".
        reversed: the same for chosen falling and rejected rising.
        positive_lowered: of rows that are no pairs, share of those with a positive weight that steps lower, to first
            order, from which that is said.
        layers: share of the inner product that the layers named must hold together.
        again: windows that must pass before the same is said again.

    Raises:
        InputError: a share outside of (0, 1], or `again` or `pairs` below 1.
    """

    pairs: int = 32
    explained: float = 0.5
    chosen_falls: float = 0.0
    both_down: float = 0.5
    both_up: float = 0.9
    reversed: float = 0.25
    positive_lowered: float = 0.25
    layers: float = 2 / 3
    again: int = 10

    def __post_init__(self) -> None:
        for name in ("both_down", "both_up", "reversed", "positive_lowered", "layers", "explained"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"Alert: {name}={getattr(self, name)!r}; accepted is a share, 0 < share <= 1.")
        if self.chosen_falls < 0:
            raise InputError(f"Alert: chosen_falls={self.chosen_falls!r}; accepted is a number of nats >= 0.")
        for name, noun in (("again", "windows"), ("pairs", "pairs")):
            if getattr(self, name) < 1:
                raise InputError(f"Alert: {name}={getattr(self, name)!r}; accepted is a number of {noun} >= 1.")


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
    """What moved both sides in the window's steps that have an account; empty where none has."""
    places = _find_places(window)
    if not places:
        return ""
    errors = {"chosen": _mean(window, places, 0)[1], "rejected": _mean(window, places, 1)[1]}
    each = " a step" if len(places) > 1 else ""
    sides = "; ".join(
        _describe_side(side, window.moved_mean(side, places), error, each) for side, error in errors.items()
    )
    explained = "" if window.explained is None else f"; {max(0.0, window.explained):.0%} explained"
    partial = "" if window.is_whole else "; without later micro-batches, other ranks and rows that have no partner"
    return (
        f"{_name_steps([window.steps[place] for place in places])}: {sides}{explained}{partial}{_describe_term(window)}"
    )


def _describe_term(window: Window) -> str:
    """The likelihood term that would have been enough; empty where it is not known to hold, or not needed."""
    if window.nll_weight is None or window.explained is None or window.explained < _TERM_EXPLAINED:
        return ""
    weight, error = window.nll_weight
    if weight <= _CLEARLY * error:
        return ""
    return (
        f"; to first order, a likelihood term (RPO, 'sft' in loss_type) of weight {weight:.2g} ± {error:.1g} keeps "
        "chosen of pairs outside the batch level"
    )


def _name_steps(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if steps[0] == steps[-1] else f"steps {steps[0]}-{steps[-1]}"


def _find_places(window: Window) -> list[int]:
    """Places of the steps that are told of: those with an account, but for a run's first steps."""
    return [place for place in window.accounted_places if window.steps[place] >= FIRST_TOLD]


def _mean(window: Window, places: Sequence[int], side: int) -> tuple[float, float]:
    """Mean change of chosen (0) or rejected (1) over the pairs of these steps, and its error; nan for none."""
    starts = [sum(window.pairs[:place]) for place in places] if window.accounted else []
    values = [
        window.accounted[pair][side]
        for start, place in zip(starts, places, strict=False)
        for pair in range(start, start + window.pairs[place])
    ]
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def _describe_side(side: str, moved: dict[str, float], error: float, each: str) -> str:
    spread = "" if math.isnan(error) else f" ± {error:.1g}"
    total = f"{side} {sum(moved.values()):+.2g}{spread} nats{each}"
    if "own" not in moved:  # a step that is not split
        return total
    named = {
        "own": moved["own"], _PARTNER[side]: moved["partner"], "momentum": moved["momentum"],
        "other pairs": moved["others_chosen"] + moved["others_rejected"] + moved["earlier_batches"],
        "weight decay": moved["weight_decay"],
    }  # fmt: skip
    least = _LEAST_PART * max(map(abs, named.values()))
    parts = sorted((value, name) for name, value in named.items() if value and abs(value) >= least)
    return f"{total} ({', '.join(f'{name} {value:+.2g}' for value, name in parts)})"


def _describe_pairs(window: Window, alert: Alert) -> str:
    """The verdict of each pair alone; empty where no threshold is reached."""
    case = _worst_case(window, alert)
    if case is None:
        return ""
    share = f"{window.share(case):.0%} of {sum(window.pairs)} pairs in {_CASES[case]}"
    parts = [f"{_name_steps(window.steps)}: {share}, each pair alone under plain gradient descent"]
    for part in (_describe_needs(window) if case == "both_down" else None, _find_layers(window, alert.layers)):
        if part is not None:
            parts.append(part)
    return "; ".join(parts)


def _describe_needs(window: Window) -> str | None:
    """From which `d_w/d_l` chosen would rise, of the pairs in case 2, where each needs more than it has."""
    pairs = [pair for pair in zip(window.chosen_needs, window.weight_ratio, strict=True) if pair[1] > 0]
    if not pairs:
        return None
    ratio = pairs[0][1]
    is_one = all(math.isclose(each, ratio, rel_tol=1e-6) for _, each in pairs)
    need = statistics.median(needs if is_one else needs / each for needs, each in pairs)
    texts = _tell_apart(need, ratio if is_one else 1.0)
    if texts is None:
        return None
    if is_one:
        return f"chosen would rise if d_w/d_l ≥ {texts[0]} (median over the pairs in case 2; it is {texts[1]})"
    return f"chosen would rise if d_w/d_l were {texts[0]} times what it is (median over the pairs in case 2)"


def _tell_apart(larger: float, smaller: float) -> tuple[str, str] | None:
    """Both numbers with as many digits as it takes to see which is larger; None where that takes too many."""
    for digits in range(2, _MOST_DIGITS + 1):
        texts = f"{larger:.{digits}g}", f"{smaller:.{digits}g}"
        if float(texts[0]) > float(texts[1]):
            return texts
    return None


def _find_news(window: Window, alert: Alert) -> list[str]:
    """What a window has that is worth a sentence: that a step lowers chosen, and its case."""
    case = _worst_case(window, alert)
    falls = sum(window.pairs) >= alert.pairs and _may_tell_falls(window, alert) and _is_falling(window, alert)
    return [*(["chosen falls"] if falls else []), *([] if case is None else [case])]


def _may_tell_falls(window: Window, alert: Alert) -> bool:
    """Whether the account explains enough of what really happened for a fall to be said."""
    return window.explained is None or window.explained >= alert.explained


def _is_falling(window: Window, alert: Alert) -> bool:
    """Whether steps clearly lower chosen by more than the threshold."""
    places = _find_places(window)
    if not places or not window.is_whole:
        return False
    error = _mean(window, places, 0)[1]
    total = sum(window.moved_mean("chosen", places).values())
    return total < -alert.chosen_falls and (math.isnan(error) or total < -_CLEARLY * error)


def _worst_case(window: Window, alert: Alert) -> str | None:
    """The case that is furthest beyond its threshold; None where none is, and of too few pairs."""
    if sum(window.pairs) < alert.pairs:
        return None
    cases = ("reversed", "both_down", "both_up") if _may_tell_falls(window, alert) else ("both_up",)
    shares = {case: window.share(case) / getattr(alert, case) for case in cases}
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
