"""What wandb shows beyond scalars: stacked cases, layers by steps, predicted and realised changes, pairs with text."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from gradent.errors import GradentError, InputError
from gradent.figures.charts import Chart, Figure, HeatMap, Line, token_cosines
from gradent.figures.plotly import draw_plotly
from gradent.notices import Notices
from gradent.report.live.window import TokenHeatMap, Window
from gradent.report.page.cases import CASES

__all__ = ["Panels", "wandb_dashboard"]

_MOST_POINTS = 2000


class Panels:
    """Sends windows to the wandb run that is active, if one is; keeps what panels need of earlier windows."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._cases: list[dict[str, float]] = []
        self._layers: dict[str, dict[int, float | None]] = {}
        self._changes: list[tuple[float, float, float, float]] = []
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
        changes = zip(window.predicted, window.realised, strict=False)
        self._changes = [*self._changes, *((*predicted, *realised) for predicted, realised in changes)][-_MOST_POINTS:]
        content: dict[str, Any] = {**scalars, "train/global_step": step}
        if window.entangled:
            columns = ["step", "cosine", "case", "prompt", "chosen", "rejected"]
            rows = [[getattr(pair, column) for column in columns] for pair in window.entangled]
            content["gradent/pairs"] = wandb.Table(columns=columns, data=rows)
        try:
            drawings = {name: draw_plotly(figure) for name, figure in self._figures(window.tokens).items()}
        except ImportError:
            self._notices.once('gradent sends no figures to wandb without plotly: pip install "gradent[audit]".')
        else:
            content |= {name: wandb.Plotly(drawing) for name, drawing in drawings.items()}
        run.log(content)

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
        if self._changes:
            chosen, rejected, *realised = zip(*self._changes, strict=True)
            sides = zip(("chosen", "rejected"), (chosen, rejected), realised, strict=True)
            figures["gradent/changes"] = Chart(
                "predicted, first order (nats per unit of learning rate)", "realised by the optimizer's step (nats)",
                [Line(side, predicted, change, colour=side, points=True) for side, predicted, change in sides],
                title="Predicted and realised changes of log-probs",
            )  # fmt: skip
        if tokens is not None:
            title = f"Cosine of token gradients, most entangled pair of step {tokens.step}"
            figures["gradent/tokens"] = token_cosines(tokens.chosen, tokens.rejected, tokens.cosines, title=title)
        return figures


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
    panels += [reports.MediaBrowser(media_keys=[f"gradent/{key}"]) for key in ("cases", "layers", "changes", "tokens")]
    try:
        section = workspaces.Section(name="gradent", panels=panels)
        view = workspaces.Workspace(entity=entity, project=project, name=name, sections=[section])
        view.save()
    except Exception as error:
        raise GradentError(f"wandb did not make the view {name!r} in {entity}/{project}: {error}") from error
    return str(view.url)
