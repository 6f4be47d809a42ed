"""What wandb shows of groups beyond scalars: what moved positives and negatives, spikes of the gradient, pushes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from gradent.figures.charts import Chart, Figure, Line
from gradent.notices import Notices
from gradent.report.live.group_window import GroupWindow
from gradent.report.live.moved_bars import MovedBars
from gradent.report.live.wandb import MOST_POINTS, log_figures, make_table

__all__ = ["GroupPanels"]


class GroupPanels:
    """Sends windows to the wandb run that is active, if one is; keeps what panels need of earlier windows."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._moved = MovedBars()
        self._against: dict[str, list[float]] = {"positives that fall": [], "negatives that rise": []}
        self._changes: list[tuple[float, float]] = []
        self._notices = Notices()

    def send(self, window: GroupWindow, scalars: Mapping[str, float], step: int) -> None:
        """Log the steps since the last call with their `gradent/...` scalars, at the trainer's global step."""
        wandb = sys.modules.get("wandb")  # a run is active only where somebody has imported it
        run = getattr(wandb, "run", None)
        if wandb is None or run is None:
            return
        self._steps += window.steps
        self._moved.add(window.moved, len(self._steps))
        counts = (window.positives, window.lowered), (window.negatives, window.raised)
        for shares, (all_rows, against) in zip(self._against.values(), counts, strict=True):
            shares += [part / count if count else float("nan") for count, part in zip(all_rows, against, strict=True)]
        self._changes = [*self._changes, *window.accounted][-MOST_POINTS:]
        content: dict[str, Any] = {**scalars, "train/global_step": step}
        if window.rollouts:
            names = ["step", "share", "weight", "prompt", "text"]
            content["gradent/rollouts"] = make_table(wandb, names, window.rollouts)
        if window.pushes:
            names = ["step", "moved", "change", "by", "push", "text", "by_text"]
            content["gradent/pushes"] = make_table(wandb, names, window.pushes)
        log_figures(wandb, content, self._figures(), self._notices)

    def _figures(self) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        if any(share == share for shares in self._against.values() for share in shares):
            lines = [Line(name, self._steps, shares) for name, shares in self._against.items()]
            title = "Rows that a step moves against their weight"
            figures["gradent/against"] = Chart("step", "share of rows", lines, title=title, percent=True)
        figures |= self._moved.figures(self._steps, " rows")
        if self._changes:
            predicted, realised = zip(*self._changes, strict=True)
            figures["gradent/changes"] = Chart(
                "account of the step, first order (nats)", "realised by the optimizer's step (nats)",
                [Line("rows", predicted, realised, points=True)], title="Account of the step and realised changes",
            )  # fmt: skip
        return figures
