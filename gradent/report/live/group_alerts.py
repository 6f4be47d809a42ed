"""What a step did to the rows of groups, in words, for the training log: a sentence when it matters."""

from __future__ import annotations

from gradent.report.live.alerts import FIRST_TOLD, Alert
from gradent.report.live.group_window import GroupWindow

__all__ = ["GroupAlerter", "describe_groups"]

_NAMES = {
    "own": "their own part of the step", "positives": "positives of their own group",
    "negatives": "negatives of their own group", "other_groups": "other groups",
    "earlier_batches": "earlier micro-batches", "momentum": "momentum", "weight_decay": "weight decay",
}  # fmt: skip


class GroupAlerter:
    """Describes window after window, and the same only now and then."""

    def __init__(self, alert: Alert) -> None:
        self._alert = alert
        self._windows, self._last = 0, -alert.again

    def check(self, window: GroupWindow) -> str | None:
        """The line for a window; None where no threshold is reached, or it was described not long ago."""
        text = describe_groups(window, self._alert)
        self._windows += 1
        if text is None or self._windows - self._last < self._alert.again:
            return None
        self._last = self._windows
        return text


def describe_groups(window: GroupWindow, alert: Alert) -> str | None:
    """What a window's steps do to positives, in one line; None where too few fall, and in a run's first steps."""
    places = [place for place, step in enumerate(window.steps) if step >= FIRST_TOLD and window.positives[place]]
    positives, lowered = (sum(values[place] for place in places) for values in (window.positives, window.lowered))
    if positives < alert.pairs or not window.is_whole or lowered / positives < alert.positive_lowered:
        return None
    if window.explained is not None and window.explained < alert.explained:
        return None
    first, last = window.steps[places[0]], window.steps[places[-1]]
    steps = f"step {first}" if first == last else f"steps {first}-{last}"
    parts = [f"{steps}: {lowered / positives:.0%} of {positives} positives fall"]
    causes = {source: value for source, value in window.lowering.items() if value < 0}
    if causes:
        source = min(causes, key=lambda name: causes[name])
        parts.append(f"{causes[source] / sum(causes.values()):.0%} of it by {_NAMES.get(source, source)}")
    explained = "" if window.explained is None else f"; {max(0.0, window.explained):.0%} explained"
    text = ", ".join(parts) + explained
    if causes and min(causes, key=lambda name: causes[name]) == "negatives":
        text += "; published GRPO runs with such steps have collapsed later (docs/groups.md)"
    return text
