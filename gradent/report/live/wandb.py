"""What wandb shows beyond scalars: stacked cases, layers by steps, predicted and realised changes, pairs with text."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from gradent.errors import GradentError, InputError
from gradent.figures.charts import Chart, Figure, HeatMap, Line, token_cosines
from gradent.figures.plotly import draw_plotly
from gradent.notices import Notices
from gradent.record import MOVED_SOURCES, UNSPLIT
from gradent.report.live.moved_bars import MovedBars
from gradent.report.live.window import TokenHeatMap, Window
from gradent.report.page.cases import CASES

__all__ = ["MOST_POINTS", "Panels", "log_figures", "make_table", "wandb_dashboard"]

MOST_POINTS = 2000

_HELD: weakref.WeakKeyDictionary[Any, int | None] = weakref.WeakKeyDictionary()
"""A run's counter when content was left there that nobody had committed yet."""


class Panels:
    """Sends windows to the wandb run that is active, if one is; keeps what panels need of earlier windows."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._cases: list[dict[str, float]] = []
        self._layers: dict[str, dict[int, float | None]] = {}
        self._changes: list[tuple[float, float, float, float]] = []
        self._moved = MovedBars()
        self._is_accounted = False
        self._notices = Notices()

    def send(self, window: Window, scalars: Mapping[str, float], step: int) -> None:
        """Log the steps since the last call with their `gradent/...` scalars, at the trainer's global step."""
        wandb = sys.modules.get("wandb")  # a run is active only where somebody has imported it
        run = getattr(wandb, "run", None)
        if wandb is None or run is None:
            return
        self._steps += window.steps
        self._cases += window.cases
        for layer, cosines in window.layer_cosines.items():
            self._layers.setdefault(layer, {}).update(zip(window.steps, cosines, strict=True))
        self._moved.add(window.moved, len(self._steps))
        if window.accounted and not self._is_accounted:  # from here on the account is drawn, in other units
            self._is_accounted, self._changes = True, []
        changes = zip(window.accounted if self._is_accounted else window.predicted, window.realised, strict=False)
        points = [(*predicted, *realised) for predicted, realised in changes if not math.isnan(predicted[0])]
        self._changes = [*self._changes, *points][-MOST_POINTS:]
        content: dict[str, Any] = {**scalars, "train/global_step": step}
        if window.entangled:
            names = ["step", "cosine", "case", "prompt", "chosen", "rejected"]
            content["gradent/pairs"] = make_table(wandb, names, window.entangled)
        if window.pushes:
            names = ["step", "moved", "change", "by", "push", "text", "by_text"]
            content["gradent/pushes"] = make_table(wandb, names, window.pushes)
        log_figures(wandb, content, self._figures(window.tokens), self._notices)

    def _figures(self, tokens: TokenHeatMap | None) -> dict[str, Figure]:
        shares = {name: [cases.get(name, 0.0) for cases in self._cases] for name in CASES}
        cases = [Line(name.replace("_", " "), self._steps, shares[name], colour=name) for name in CASES]
        figures: dict[str, Figure] = {
            "gradent/cases": Chart("step", "share of pairs", cases, title="Cases", percent=True, stacked=True)
        }
        if self._layers:
            cosines = [[layer.get(step) for step in self._steps] for layer in self._layers.values()]
            title, names = "Cosine of chosen and rejected gradients by layer", list(self._layers)
            figures["gradent/layers"] = HeatMap("step", "layer", self._steps, names, cosines, "cosine", title=title)
        figures |= self._moved.figures(self._steps)
        if self._changes:
            predicted = "predicted, first order (nats per unit of learning rate)"
            title = "Predicted and realised changes of log-probs, each pair alone"
            if self._is_accounted:
                predicted, title = "account of the step, first order (nats)", "Account of the step and realised changes"
                title += _share_explained(self._changes)
            chosen, rejected, *realised = zip(*self._changes, strict=True)
            sides = zip(("chosen", "rejected"), (chosen, rejected), realised, strict=True)
            figures["gradent/changes"] = Chart(
                predicted, "realised by the optimizer's step (nats)",
                [Line(side, values, change, colour=side, points=True) for side, values, change in sides], title=title,
            )  # fmt: skip
        if tokens is not None:
            title = f"Cosine of token gradients, most entangled pair of step {tokens.step}"
            figures["gradent/tokens"] = token_cosines(tokens.chosen, tokens.rejected, tokens.cosines, title=title)
        return figures


def log_figures(wandb: Any, content: dict[str, Any], figures: Mapping[str, Figure], notices: Notices) -> None:
    """Log content and, where plotly is installed, figures to the active run."""
    try:
        drawings = {name: draw_plotly(figure) for name, figure in figures.items()}
    except ImportError:
        notices.once('gradent sends no figures to wandb without plotly: pip install "gradent[audit]".')
        drawings = {}
    run = wandb.run
    # A row of its own would move wandb's counter on, and what the user logs with `step=` would lie behind it and be
    # dropped: these wait for the row that somebody else commits, and are committed where nobody does before the next.
    held = _HELD.get(run)
    if held is not None and held == getattr(run, "step", None):
        run.log({}, commit=True)
    run.log(content | {name: wandb.Plotly(drawing) for name, drawing in drawings.items()}, commit=False)
    _HELD[run] = getattr(run, "step", None)


def _share_explained(changes: Sequence[tuple[float, float, float, float]]) -> str:
    """The share of the realised changes' variance (against zero) that is explained, as the end of a title."""
    moved = sum(each[2] ** 2 + each[3] ** 2 for each in changes)  # predicted of both sides, then realised
    rest = sum((each[2] - each[0]) ** 2 + (each[3] - each[1]) ** 2 for each in changes)
    return f": {max(0.0, 1 - rest / moved):.1%} explained" if moved > 0 else ""


def make_table(wandb: Any, names: list[str], entries: Sequence[Any]) -> Any:
    """Attributes of some entries as a table."""
    return wandb.Table(columns=names, data=[[getattr(entry, name) for name in names] for entry in entries])


def wandb_dashboard(entity: str, project: str, *, name: str = "gradent") -> str:
    """Make (or make again) a workspace view of gradent's panels in a wandb project.

    Args:
        entity: wandb user or team.
        project: name of the project.
        name: name of the view.

    Returns:
        The view's URL.

    Raises:
        InputError: the package `wandb-workspaces` is not installed.
        GradentError: wandb refuses (no account, no such project).
    """
    try:
        import wandb_workspaces.reports.v2 as reports  # noqa: PLC0415  (optional)
        import wandb_workspaces.workspaces as workspaces  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            "wandb_dashboard needs the package wandb-workspaces, which is not installed: pip install wandb-workspaces."
        ) from error
    lines = {
        "What moved chosen (nats)": [f"gradent/moved/chosen/{source}" for source in (*MOVED_SOURCES, UNSPLIT)],
        "What moved rejected (nats)": [f"gradent/moved/rejected/{source}" for source in (*MOVED_SOURCES, UNSPLIT)],
        "Explained": ["gradent/explained"],
        "A pair that is not in the step (nats)": ["gradent/unseen/chosen", "gradent/unseen/rejected"],
        "Cosine": ["gradent/cosine", "gradent/probe/cosine"],
        "Norms": ["gradent/chosen_norm", "gradent/rejected_norm"],
        "Cases": [f"gradent/case/{case}" for case in CASES if case != "inactive"],
        "Predicted changes": ["gradent/chosen_change", "gradent/rejected_change"],
        "Realised changes": ["gradent/chosen_realised", "gradent/rejected_realised"],
        "Weights d_w/d_l": ["gradent/weight_ratio"],
        "Log-probs": ["train/logps/chosen", "train/logps/rejected"],
        "Overhead (s)": ["gradent/overhead_s"],
    }
    panels = [reports.LinePlot(title=title, x="train/global_step", y=keys) for title, keys in lines.items()]
    media = ("moved_chosen", "moved_rejected", "changes", "cases", "layers", "tokens")
    panels += [reports.MediaBrowser(media_keys=[f"gradent/{key}"]) for key in media]
    try:
        section = workspaces.Section(name="gradent", panels=panels)
        view = workspaces.Workspace(entity=entity, project=project, name=name, sections=[section])
        view.save()
    except Exception as error:
        raise GradentError(f"wandb did not make the view {name!r} in {entity}/{project}: {error}") from error
    return str(view.url)
