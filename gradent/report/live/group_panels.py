"""What wandb shows of groups beyond scalars: what moved positives and negatives, spikes of the gradient, pushes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradent.figures.charts import Chart, Figure, Line
from gradent.report.live.bins import Bins, shorten
from gradent.report.live.group_window import GroupWindow, Rollout
from gradent.report.live.moved_bars import MovedBars
from gradent.report.live.wandb import MOST_ENTRIES, MOST_POINTS, Sender, keep_largest, push_table
from gradent.report.live.window import Push

__all__ = ["GroupPanels"]


class GroupPanels(Sender):
    """What a run on rows in groups shows."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[int] = []
        self._moved = MovedBars()
        self._against: dict[str, list[float]] = {"positives that fall": [], "negatives that rise": []}
        self._changes: list[tuple[float, float]] = []
        self._rollouts: list[Rollout] = []
        self._pushes: list[Push] = []

    def _add(self, window: GroupWindow) -> None:
        self._steps += window.steps
        self._moved.add(window.moved, len(self._steps))
        counts = (window.positives, window.lowered), (window.negatives, window.raised)
        for shares, (all_rows, against) in zip(self._against.values(), counts, strict=True):
            shares += [part / count if count else float("nan") for count, part in zip(all_rows, against, strict=True)]
        self._changes = [*self._changes, *window.accounted][-MOST_POINTS:]
        rollouts = sorted([*self._rollouts, *window.rollouts], key=lambda rollout: -rollout.share)
        self._rollouts = rollouts[:MOST_ENTRIES]
        self._pushes = keep_largest(self._pushes, window.pushes)

    def _tables(self) -> dict[str, tuple[list[str], Sequence[Any]]]:
        names = ["step", "share", "weight", "prompt", "text"]
        rollouts: dict[str, tuple[list[str], Sequence[Any]]] = {"gradent/rollouts": (names, self._rollouts)}
        return (rollouts if self._rollouts else {}) | push_table(self._pushes)

    def _figures(self) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        bins = Bins(self._steps)
        if any(share == share for shares in self._against.values() for share in shares):
            lines = [Line(name, bins.places, bins.mean(shares), points=True) for name, shares in self._against.items()]
            title = "Rows that a step moves against their weight"
            figures["gradent/against"] = Chart("step", "share of rows", lines, title=title, percent=True)
        figures |= self._moved.figures(bins, " rows")
        if self._changes:
            predicted, realised = (list(map(shorten, column)) for column in zip(*self._changes, strict=True))
            figures["gradent/changes"] = Chart(
                "account of the step, first order (nats)", "realised by the optimizer's step (nats)",
                [Line("rows", predicted, realised, points=True)], title="Account of the step and realised changes",
            )  # fmt: skip
        return figures
