"""What wandb shows beyond scalars: cases, layers by steps, predicted and realised changes, pairs with text."""

from __future__ import annotations

import math
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from gradent.errors import GradentError, InputError
from gradent.figures.charts import Bars, Chart, Figure, HeatMap, Line, Series, token_cosines
from gradent.figures.plotly import draw_plotly
from gradent.notices import Notices
from gradent.record import MOVED_SOURCES, UNSPLIT
from gradent.report.live.bins import Bins, Pace, shorten
from gradent.report.live.moved_bars import MovedBars
from gradent.report.live.window import EntangledPair, Push, TokenHeatMap, Window
from gradent.report.page.cases import CASES

__all__ = ["MOST_ENTRIES", "MOST_POINTS", "Panels", "Sender", "keep_largest", "push_table", "wandb_dashboard"]

MOST_POINTS = 1000
"""Of the scatter of changes: the run's last ones."""

MOST_ENTRIES = 8
"""Of a table: the run's largest ones so far."""

_HELD: weakref.WeakKeyDictionary[Any, int | None] = weakref.WeakKeyDictionary()
"""A run's counter when content was left there that nobody had committed yet."""


class Sender(ABC):
    """Sends scalars and, now and then, figures to the wandb run that is active, if one is."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._notices = Notices()
        self._step: int | None = None  # of windows whose figures were not sent yet

    @property
    def is_drawing(self) -> bool:
        """Whether a run is active that is shown figures."""
        return _active_run() is not None and find_spec("plotly") is not None

    def send(self, window: Any, scalars: Mapping[str, float], step: int, last: int = 0) -> None:
        """Take the steps since the last call; log their `gradent/...` scalars, and figures where they are due.

        `step` is the trainer's global step, `last` that of the run's end (0: not known).
        """
        if _active_run() is None:
            return
        self._add(window)
        self._step = step
        if self._pace.is_due(step, last):
            self._log(dict(scalars))
        elif scalars:
            self._log_content(dict(scalars), step)

    def finish(self, verdict: str) -> None:
        """Log what was not sent yet, and put the run's verdict into its summary."""
        run = _active_run()
        if run is None:
            return
        if self._step is not None:
            self._log({})
        run.summary["gradent/verdict"] = verdict

    def _log(self, content: dict[str, Any]) -> None:
        step, self._step = self._step, None
        wandb = sys.modules["wandb"]
        tables = {name: make_table(wandb, names, entries) for name, (names, entries) in self._tables().items()}
        log_figures(wandb, {**content, **tables, "train/global_step": step}, self._figures(), self._notices)

    def _log_content(self, content: dict[str, Any], step: int) -> None:
        log_figures(sys.modules["wandb"], {**content, "train/global_step": step}, {}, self._notices)

    @abstractmethod
    def _add(self, window: Any) -> None:
        """Keep what figures and tables need of a window."""

    @abstractmethod
    def _figures(self) -> dict[str, Figure]:
        """The figures of the run so far, by their names."""

    @abstractmethod
    def _tables(self) -> dict[str, tuple[list[str], Sequence[Any]]]:
        """Columns and entries of the tables of the run so far, by their names."""


class Panels(Sender):
    """What a run on pairs shows."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[int] = []
        self._pairs: list[int] = []
        self._cases: list[dict[str, float]] = []
        self._layers: dict[str, dict[int, float | None]] = {}
        self._changes: list[tuple[float, float, float, float]] = []
        self._moved = MovedBars()
        self._is_accounted = False
        self._entangled: list[EntangledPair] = []
        self._pushes: list[Push] = []
        self._tokens: TokenHeatMap | None = None

    def _add(self, window: Window) -> None:
        self._steps += window.steps
        self._pairs += window.pairs
        self._cases += window.cases
        for layer, cosines in window.layer_cosines.items():
            self._layers.setdefault(layer, {}).update(zip(window.steps, cosines, strict=True))
        self._moved.add(window.moved, len(self._steps))
        if window.accounted and not self._is_accounted:  # from here on the account is drawn, in other units
            self._is_accounted, self._changes = True, []
        changes = zip(window.accounted if self._is_accounted else window.predicted, window.realised, strict=False)
        points = [(*predicted, *realised) for predicted, realised in changes if not math.isnan(predicted[0])]
        self._changes = [*self._changes, *points][-MOST_POINTS:]
        kept: dict[tuple[str, ...], EntangledPair] = {}
        for pair in sorted([*self._entangled, *window.entangled], key=lambda pair: -pair.cosine):
            kept.setdefault((pair.prompt, pair.chosen, pair.rejected), pair)
        self._entangled = list(kept.values())[:MOST_ENTRIES]
        self._pushes = keep_largest(self._pushes, window.pushes)
        self._tokens = window.tokens or self._tokens

    def _tables(self) -> dict[str, tuple[list[str], Sequence[Any]]]:
        tables: dict[str, tuple[list[str], Sequence[Any]]] = {}
        if self._entangled:
            names = ["step", "cosine", "case", "prompt", "chosen", "rejected"]
            tables["gradent/pairs"] = names, self._entangled
        return tables | push_table(self._pushes)

    def _figures(self) -> dict[str, Figure]:
        bins = Bins(self._steps, self._pairs)
        shares = {name: bins.mean([cases.get(name, 0.0) for cases in self._cases]) for name in CASES}
        names = [f"{name}, {pairs} pairs" for name, pairs in zip(bins.names, bins.sizes, strict=True)]
        title = f"Cases of {_describe_sizes(bins.sizes)}, each pair alone"
        figures: dict[str, Figure] = {
            "gradent/cases": Bars(
                "step", "share of pairs", names,
                [Series(name.replace("_", " "), shares[name], name) for name in CASES],
                title=title, percent=True, upright=True, places=bins.places,
            )
        }  # fmt: skip
        if self._layers:
            cosines = [bins.mean([layer.get(step) for step in self._steps]) for layer in self._layers.values()]
            title, layers = "Cosine of chosen and rejected gradients by layer", list(self._layers)
            figures["gradent/layers"] = HeatMap("step", "layer", bins.places, layers, cosines, "cosine", title=title)
        figures |= self._moved.figures(bins)
        if self._changes:
            predicted = "predicted, first order (nats per unit of learning rate)"
            title = "Predicted and realised changes of log-probs, each pair alone"
            if self._is_accounted:
                predicted, title = "account of the step, first order (nats)", "Account of the step and realised changes"
                title += _share_explained(self._changes)
            columns = [list(map(shorten, column)) for column in zip(*self._changes, strict=True)]
            sides = zip(("chosen", "rejected"), columns[:2], columns[2:], strict=True)
            figures["gradent/changes"] = Chart(
                predicted, "realised by the optimizer's step (nats)",
                [Line(side, values, change, colour=side, points=True) for side, values, change in sides], title=title,
            )  # fmt: skip
        tokens = self._tokens
        if tokens is not None:
            title = f"Cosine of token gradients, most entangled pair of step {tokens.step}"
            figures["gradent/tokens"] = token_cosines(tokens.chosen, tokens.rejected, tokens.cosines, title=title)
        return figures


def keep_largest(known: Sequence[Push], found: Sequence[Push]) -> list[Push]:
    """The largest pushes of a run, largest first."""
    return sorted([*known, *found], key=lambda push: -abs(push.push))[:MOST_ENTRIES]


def push_table(pushes: Sequence[Push]) -> dict[str, tuple[list[str], Sequence[Any]]]:
    """The table of pushes by its name; empty without any."""
    names = ["step", "moved", "change", "by", "push", "text", "by_text"]
    return {"gradent/pushes": (names, pushes)} if pushes else {}


def _describe_sizes(sizes: Sequence[int]) -> str:
    low, high = min(sizes, default=0), max(sizes, default=0)
    return f"{sum(sizes):,} pairs ({low if low == high else f'{low} to {high}'} a bar)"


def _active_run() -> Any:
    """The active run of a wandb that somebody else has imported; None for none."""
    return getattr(sys.modules.get("wandb"), "run", None)


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
    main = [
        reports.LinePlot(title=title, x="train/global_step", y=keys)
        for title, keys in {
            "Chosen, all sources (nats a step)": ["gradent/moved/chosen/total"],
            "Both fall, each pair alone": ["gradent/case/both_down", "gradent/probe/case/both_down"],
            "Cosine": ["gradent/cosine", "gradent/probe/cosine"],
            "A pair that is not in the step (nats)": ["gradent/unseen/chosen"],
            "Log-probs": ["train/logps/chosen", "train/logps/rejected"],
            "Explained": ["gradent/explained"],
        }.items()
    ]
    media = ("moved_chosen", "moved_rejected", "cases", "layers", "changes", "tokens")
    main += [reports.MediaBrowser(media_keys=[f"gradent/{key}"]) for key in media]
    detail = [
        reports.LinePlot(title=title, x="train/global_step", y=keys)
        for title, keys in {
            "What moved chosen (nats)": [f"gradent/moved/chosen/{source}" for source in (*MOVED_SOURCES, UNSPLIT)],
            "What moved rejected (nats)": [f"gradent/moved/rejected/{source}" for source in (*MOVED_SOURCES, UNSPLIT)],
            "Rejected of a pair that is not in the step (nats)": ["gradent/unseen/rejected"],
            "Norms": ["gradent/chosen_norm", "gradent/rejected_norm"],
            "Cases": [f"gradent/case/{case}" for case in CASES if case != "inactive"],
            "Predicted changes": ["gradent/chosen_change", "gradent/rejected_change"],
            "Realised changes": ["gradent/chosen_realised", "gradent/rejected_realised"],
            "Weights d_w/d_l, and the band in which case 1 holds": [
                "gradent/weight_ratio",
                "gradent/band/low",
                "gradent/band/high",
            ],
            "Overhead (s)": ["gradent/overhead_s"],
        }.items()
    ]
    try:
        sections = [
            workspaces.Section(name="gradent", panels=main, is_open=True),
            workspaces.Section(name="gradent, detail=True", panels=detail, is_open=False),
        ]
        view = workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)
        view.save()
    except Exception as error:
        raise GradentError(f"wandb did not make the view {name!r} in {entity}/{project}: {error}") from error
    return str(view.url)
