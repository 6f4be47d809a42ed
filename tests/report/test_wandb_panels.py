"""What is sent to wandb: to a run that is active, by a wandb that somebody else has imported, and else nothing."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gradent.errors import GradentError, InputError
from gradent.record import MOVED_SOURCES
from gradent.report.live.wandb import Panels, wandb_dashboard
from gradent.report.live.window import EntangledPair, Push, Window

CASES = {"ideal": 0.25, "both_down": 0.5, "both_up": 0.25, "reversed": 0.0, "inactive": 0.0}


def window(step: int, **fields: Any) -> Window:
    return Window(steps=[step], cases=[CASES], pairs=[4], **fields)


def full(step: int) -> Window:
    pair = EntangledPair(step=step, cosine=0.9, case="both_down", prompt="p", chosen="c", rejected="r")
    return window(
        step,
        layer_cosines={"model.layers.0": [0.1 * step], "lm_head": [None]},
        predicted=[(1.0, -1.0), (2.0, -2.0)],
        realised=[(0.1, -0.1), (0.2, -0.2)],
        entangled=[pair],
    )


class Run:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, content: dict[str, Any], *, commit: bool) -> None:
        assert not commit  # the counter of somebody's own steps stays where it is
        self.logged.append(content)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    wandb = ModuleType("wandb")
    wandb.run = Run()
    wandb.Table = lambda columns, data: SimpleNamespace(columns=columns, data=data)
    wandb.Plotly = lambda figure: figure
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb.run


def test_everything_there_is(run: Run) -> None:
    Panels().send(full(3), {"gradent/cosine": 0.5}, 3)
    (content,) = run.logged
    assert set(content) == {
        "gradent/cosine", "train/global_step", "gradent/pairs", "gradent/cases", "gradent/layers", "gradent/changes",
    }  # fmt: skip
    assert content["gradent/cosine"] == 0.5 and content["train/global_step"] == 3
    table = content["gradent/pairs"]
    assert table.columns == ["step", "cosine", "case", "prompt", "chosen", "rejected"]
    assert table.data == [[3, 0.9, "both_down", "p", "c", "r"]]
    assert sum(trace.y[0] for trace in content["gradent/cases"].data) == 1.0
    assert [trace.name for trace in content["gradent/cases"].data] == [
        "ideal", "both down", "both up", "reversed", "inactive",
    ]  # fmt: skip
    (heat,) = content["gradent/layers"].data
    assert list(heat.y) == ["model.layers.0", "lm_head"] and heat.zmin == -1 and heat.zmax == 1
    chosen, rejected = content["gradent/changes"].data
    assert list(chosen.x) == [1.0, 2.0] and list(chosen.y) == [0.1, 0.2]
    assert list(rejected.x) == [-1.0, -2.0] and list(rejected.y) == [-0.1, -0.2]


def test_figures_grow_with_the_run(run: Run) -> None:
    panels = Panels()
    for step in (1, 2, 4):
        panels.send(full(step), {}, step)
    last = run.logged[-1]
    assert list(last["gradent/cases"].data[0].x) == [1, 2, 4]
    (heat,) = last["gradent/layers"].data
    assert list(heat.x) == [1, 2, 4]
    assert [list(row) for row in heat.z] == [[0.1, 0.2, 0.4], [None, None, None]]
    assert len(last["gradent/changes"].data[0].x) == 6
    assert [row[0] for row in last["gradent/pairs"].data] == [4], "the pairs are the window's"


NAN = float("nan")
NAMES = ["own", "partner", "others chosen", "others rejected", "earlier batches", "momentum", "weight decay"]


def moves(*own: float) -> dict[str, dict[str, list[float]]]:
    """Both sides' sources, a number a step: own as given, momentum a tenth of it, others 0 (nan where own is)."""
    factors = dict.fromkeys(MOVED_SOURCES, 0.0) | {"own": 1.0, "momentum": 0.1}
    return {
        side: {source: [sign * factor * value for value in own] for source, factor in factors.items()}
        for side, sign in (("chosen", 1.0), ("rejected", -1.0))
    }


def accounted(step: int, own: float, *changes: tuple[float, float], **fields: Any) -> Window:
    realised = [(0.5, -1.0)] * len(changes)
    return window(step, moved=moves(own), accounted=changes, predicted=[(9.0, -9.0)] * len(changes), realised=realised,
                  **fields)  # fmt: skip


def test_what_moved_both_sides_as_bars(run: Run) -> None:
    panels = Panels()
    panels.send(accounted(1, 2.0), {}, 1)
    panels.send(accounted(4, -1.0), {}, 4)
    for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
        drawing = run.logged[-1][f"gradent/moved_{side}"]
        assert [trace.name for trace in drawing.data] == NAMES
        assert drawing.layout.barmode == "relative", "what raises stands above 0, what lowers below"
        assert drawing.layout.title.text == f"What moved {side}" and "nats" in drawing.layout.yaxis.title.text
        assert all(list(trace.x) == [1, 4] for trace in drawing.data)
        assert list(drawing.data[0].y) == [sign * 2.0, sign * -1.0]
        assert list(drawing.data[5].y) == pytest.approx([sign * 0.2, sign * -0.1])
        assert len({trace.marker.color for trace in drawing.data}) == len(NAMES)


def test_bars_stand_at_their_steps_where_others_have_no_account(run: Run) -> None:
    """None before the first account, inside a window, in a window of its own, and at the end."""
    panels = Panels()
    panels.send(window(1), {}, 1)
    assert not [name for name in run.logged[-1] if "moved" in name]
    two = Window(steps=[2, 3], cases=[CASES, CASES], pairs=[4, 4], moved=moves(NAN, 3.0))
    for each in (two, window(4), accounted(5, 5.0), window(6)):
        panels.send(each, {}, each.steps[-1])
    own = run.logged[-1]["gradent/moved_chosen"].data[0]
    assert list(own.x) == [1, 2, 3, 4, 5, 6] and list(own.y) == [None, None, 3.0, None, 5.0, None]


def test_the_chart_of_changes_is_the_accounts_once_there_is_one(run: Run) -> None:
    panels = Panels()
    panels.send(window(1, predicted=[(1.0, -1.0)], realised=[(0.1, -0.1)]), {}, 1)
    before = run.logged[-1]["gradent/changes"]
    assert before.layout.title.text == "Predicted and realised changes of log-probs, each pair alone"
    assert "per unit of learning rate" in before.layout.xaxis.title.text
    panels.send(accounted(2, 1.0, (0.5, -1.0), (NAN, NAN)), {}, 2)  # the second pair's step has no account
    panels.send(window(3, predicted=[(1.0, -1.0)], realised=[(0.1, -0.1)]), {}, 3)  # nor has this one
    panels.send(accounted(4, 1.0, (0.25, -1.5)), {}, 4)
    after = run.logged[-1]["gradent/changes"]
    chosen, rejected = after.data
    assert list(chosen.x) == [0.5, 0.25] and list(chosen.y) == [0.5, 0.5]
    assert list(rejected.x) == [-1.0, -1.5] and list(rejected.y) == [-1.0, -1.0]
    explained = 1 - (0.25**2 + 0.5**2) / (2 * 0.5**2 + 2 * 1.0**2)
    assert after.layout.title.text == f"Account of the step and realised changes: {explained:.1%} explained"
    assert after.layout.xaxis.title.text == "account of the step, first order (nats)"


def test_who_pushed_whom_is_a_table(run: Run) -> None:
    push = Push(
        step=7, moved="chosen of pair 1", text="good", change=-0.8, by="rejected of pair 0", by_text="bad", push=-0.5
    )
    Panels().send(accounted(7, 1.0, pushes=[push]), {}, 7)
    table = run.logged[0]["gradent/pushes"]
    assert table.columns == ["step", "moved", "change", "by", "push", "text", "by_text"]
    assert table.data == [[7, "chosen of pair 1", -0.8, "rejected of pair 0", -0.5, "good", "bad"]]


def test_a_layer_that_comes_late_leaves_a_gap(run: Run) -> None:
    panels = Panels()
    panels.send(window(1, layer_cosines={"a.0": [0.5]}), {}, 1)
    panels.send(window(2, layer_cosines={"a.1": [0.25]}), {}, 2)
    (heat,) = run.logged[-1]["gradent/layers"].data
    assert [list(row) for row in heat.z] == [[0.5, None], [None, 0.25]]


def test_only_what_there_is(run: Run) -> None:
    Panels().send(window(1), {}, 1)
    assert set(run.logged[0]) == {"train/global_step", "gradent/cases"}


@pytest.mark.parametrize("state", ["not imported", "no run", "an import that failed"])
def test_nothing_without_an_active_run(state: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if state == "not imported":
        monkeypatch.delitem(sys.modules, "wandb")
    elif state == "no run":
        monkeypatch.setattr(sys.modules["wandb"], "run", None)
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    Panels().send(full(1), {}, 1)
    assert not run.logged


def test_without_plotly_the_rest_is_sent(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    panels = Panels()
    for step in (1, 2):
        panels.send(full(step), {"gradent/cosine": 0.5}, step)
    assert [set(content) for content in run.logged] == [{"gradent/cosine", "train/global_step", "gradent/pairs"}] * 2
    (said,) = caplog.records
    assert "plotly" in said.getMessage() and "gradent[audit]" in said.getMessage()


def test_sending_imports_nothing_of_its_own() -> None:
    source = (
        "import sys\nfrom gradent.report.live.wandb import Panels\nfrom gradent.report.live.window import Window\n"
        "Panels().send(Window(steps=[1], cases=[{}], pairs=[0]), {}, 1)\n"
        "print(*sorted({'wandb', 'plotly', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def workspaces(monkeypatch: pytest.MonkeyPatch, fails: bool) -> list[Any]:
    """A stand-in for the package wandb-workspaces, and the views that were saved with it."""
    saved: list[Any] = []

    class Workspace(SimpleNamespace):
        url = "https://example.org/view"

        def save(self) -> None:
            if fails:
                raise ValueError("no such project")
            saved.append(self)

    package, reports, work = (ModuleType("wandb_workspaces" + name) for name in ("", ".reports", ".workspaces"))
    version = ModuleType("wandb_workspaces.reports.v2")
    version.LinePlot = version.MediaBrowser = SimpleNamespace
    work.Workspace, work.Section = Workspace, SimpleNamespace
    package.reports, package.workspaces, reports.v2 = reports, work, version
    for module in (package, reports, work, version):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return saved


def test_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = workspaces(monkeypatch, fails=False)
    assert wandb_dashboard("me", "project") == "https://example.org/view"
    (view,) = saved
    assert (view.entity, view.project, view.name) == ("me", "project", "gradent")
    lines = {key for panel in view.sections[0].panels for key in getattr(panel, "y", [])}
    media = {key for panel in view.sections[0].panels for key in getattr(panel, "media_keys", [])}
    assert lines >= {"gradent/cosine", "gradent/case/both_down", "gradent/weight_ratio", "gradent/overhead_s"}
    assert lines >= {f"gradent/moved/{side}/{name}" for side in ("chosen", "rejected") for name in MOVED_SOURCES}
    assert "gradent/explained" in lines
    panels = ("moved_chosen", "moved_rejected", "changes", "cases", "layers", "tokens")
    assert media == {f"gradent/{name}" for name in panels}


def test_a_dashboard_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces(monkeypatch, fails=True)
    with pytest.raises(GradentError, match="me/project: no such project"):
        wandb_dashboard("me", "project")
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(InputError, match="pip install wandb-workspaces"):
        wandb_dashboard("me", "project")
