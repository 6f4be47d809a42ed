"""The measured steps between two logs of a trainer whose rows are no pairs, as plain numbers and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gradent.report.live.window import Push

__all__ = ["GroupWindow", "Rollout"]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The row with the largest share of a step's squared gradient norm."""

    step: int
    share: float
    weight: float
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class GroupWindow:
    """Some measured steps."""

    steps: Sequence[int]  # their numbers, in order
    positives: Sequence[int]  # rows that the loss raises, of each step that has an account; 0 for one without
    lowered: Sequence[int]  # of these, rows that the step lowers
    negatives: Sequence[int]  # the same of rows that the loss lowers
    raised: Sequence[int]
    # What lowers the positives that fall: source -> nats (below zero), summed over the window
    lowering: dict[str, float] = field(default_factory=dict)
    # What moved both sides: "positive", "negative" -> source -> mean over a step's rows, nats; nan for none
    moved: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    accounted: Sequence[tuple[float, float]] = ()  # of each row with both: first-order change, realised change
    is_whole: bool = True  # all of the gradient is in these accounts
    explained: float | None = None  # share of the realised changes' variance that they explain
    rollouts: Sequence[Rollout] = ()  # those that make the gradient's norm, the largest share of each step
    pushes: Sequence[Push] = ()  # the rows that moved others most, with their text
