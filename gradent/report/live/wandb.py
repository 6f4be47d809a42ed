"""What wandb shows beyond scalars: stacked cases, layers by steps, predicted and realised changes, pairs with text."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from gradent.errors import GradentError, InputError
from gradent.report.live.window import TokenHeatMap, Window
from gradent.report.page.cases import CASE_COLOURS

__all__ = ["Panels", "wandb_dashboard"]

logger = logging.getLogger("gradent")

_POINTS = 2000


class Panels:
    """Sends windows to the wandb run that is active, if one is; keeps what panels need of earlier windows."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._cases: list[dict[str, float]] = []
        self._layers: dict[str, dict[int, float | None]] = {}
        self._changes: list[tuple[float, float, float, float]] = []
        self._said = False

    def send(self, window: Window, scalars: Mapping[str, float], step: int) -> None:
        """Log a window.

        Args:
            window: the measured steps since the last call.
            scalars: their `gradent/...` scalars.
            step: the trainer's global step.
        """
        wandb = sys.modules.get("wandb")  # a run is active only where somebody has imported it
        run = getattr(wandb, "run", None)
        if wandb is None or run is None:
            return
        self._remember(window)
        content: dict[str, Any] = {**scalars, "train/global_step": step}
        if window.entangled:
            columns = ["step", "cosine", "case", "prompt", "chosen", "rejected"]
            rows = [[getattr(pair, column) for column in columns] for pair in window.entangled]
            content["gradent/pairs"] = wandb.Table(columns=columns, data=rows)
        content |= {name: wandb.Plotly(figure) for name, figure in self._figures(window.tokens).items()}
        run.log(content)

    def _remember(self, window: Window) -> None:
        self._steps += window.steps
        self._cases += window.cases
        for layer, cosines in window.layer_cosines.items():
            self._layers.setdefault(layer, {}).update(zip(window.steps, cosines, strict=True))
        for (chosen, rejected), (chosen_real, rejected_real) in zip(window.predicted, window.realised, strict=False):
            self._changes.append((chosen, rejected, chosen_real, rejected_real))
        self._changes = self._changes[-_POINTS:]

    def _figures(self, tokens: TokenHeatMap | None) -> dict[str, Any]:
        try:
            from plotly import graph_objects  # noqa: PLC0415  (an extra)
        except ImportError:
            if not self._said:
                self._said = True
                logger.warning('gradent sends no figures to wandb without plotly: pip install "gradent[audit]".')
            return {}
        figures = {"gradent/cases": _stacked(graph_objects, self._steps, self._cases)}
        if self._layers:
            figures["gradent/layers"] = _heat_map(graph_objects, self._steps, self._layers)
        if self._changes:
            figures["gradent/changes"] = _scatter(graph_objects, self._changes)
        if tokens is not None:
            figures["gradent/tokens"] = _token_map(graph_objects, tokens)
        return figures


def _token_map(go: Any, tokens: TokenHeatMap) -> Any:
    heat = go.Heatmap(
        x=list(tokens.rejected), y=list(tokens.chosen), z=tokens.cosines, zmin=-1, zmax=1, colorscale="RdBu", zmid=0
    )
    figure = go.Figure(heat)
    figure.update_layout(
        xaxis_title="rejected token",
        yaxis_title="chosen token",
        title=f"Cosine of token gradients, most entangled pair of step {tokens.step}",
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def _stacked(go: Any, steps: list[int], cases: list[dict[str, float]]) -> Any:
    traces = [
        go.Scatter(
            x=steps, y=[shares.get(name, 0.0) for shares in cases], name=name.replace("_", " "), stackgroup="cases",
            line={"width": 0.5, "color": color},
        )
        for name, color in CASE_COLOURS.items()
    ]  # fmt: skip
    figure = go.Figure(traces)
    figure.update_layout(xaxis_title="step", yaxis_title="share of pairs", yaxis_range=[0, 1], title="Cases")
    return figure


def _heat_map(go: Any, steps: list[int], layers: dict[str, dict[int, float | None]]) -> Any:
    names = list(layers)
    values = [[layers[name].get(step) for step in steps] for name in names]
    figure = go.Figure(go.Heatmap(x=steps, y=names, z=values, zmin=-1, zmax=1, colorscale="RdBu", zmid=0))
    figure.update_layout(xaxis_title="step", title="Cosine of chosen and rejected gradients by layer")
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def _scatter(go: Any, changes: list[tuple[float, float, float, float]]) -> Any:
    chosen = go.Scatter(x=[c[0] for c in changes], y=[c[2] for c in changes], mode="markers", name="chosen")
    rejected = go.Scatter(x=[c[1] for c in changes], y=[c[3] for c in changes], mode="markers", name="rejected")
    figure = go.Figure([chosen, rejected])
    figure.update_layout(
        xaxis_title="predicted, first order (nats per unit of learning rate)",
        yaxis_title="realised by the optimizer's step (nats)",
        title="Predicted and realised changes of log-probs",
    )
    return figure


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
        "Cases": [f"gradent/case/{case}" for case in CASE_COLOURS if case != "inactive"],
        "Predicted changes": ["gradent/chosen_change", "gradent/rejected_change"],
        "Realised changes": ["gradent/chosen_realised", "gradent/rejected_realised"],
        "Weights d_w/d_l": ["gradent/weight_ratio"],
        "Log-probs": ["train/logps/chosen", "train/logps/rejected"],
        "Overhead (s)": ["gradent/overhead_s"],
    }
    panels = [reports.LinePlot(title=title, x="train/global_step", y=keys) for title, keys in lines.items()]
    panels += [reports.MediaBrowser(media_keys=[f"gradent/{key}"]) for key in ("cases", "layers", "changes", "tokens")]
    try:
        view = workspaces.Workspace(
            entity=entity, project=project, name=name, sections=[workspaces.Section(name="gradent", panels=panels)]
        )
        view.save()
    except Exception as error:
        raise GradentError(f"wandb did not make the view {name!r} in {entity}/{project}: {error}") from error
    return str(view.url)
