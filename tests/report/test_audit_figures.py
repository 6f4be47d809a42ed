"""Pictures of an audit: the same bytes each time, no state of matplotlib touched; and figures in words."""

from __future__ import annotations

import subprocess
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pytest

from gradent.figures.charts import Bars, Chart, HeatMap, Line, Series
from gradent.report import write_audit_figures
from gradent.report.page.alt_text import describe_figure, tabulate_figure
from gradent.report.page.numbers import change, count, fixed, number, percent, plural, signed_number, step_name
from tests.report.audit_records import EVIL, write_audit

NAMES = [f"{name}.{form}" for name in ("logps", "cases", "what_if") for form in ("png", "svg")]


def test_three_pictures_as_png_and_svg(tmp_path) -> None:
    write_audit(tmp_path)
    paths = write_audit_figures(tmp_path)
    assert [path.name for path in paths] == NAMES
    assert all(path.parent == tmp_path / "figures" for path in paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in paths[1].read_bytes()
    assert not list((tmp_path / "figures").glob(".*"))


def test_the_same_records_give_the_same_bytes(tmp_path) -> None:
    write_audit(tmp_path)
    first = [path.read_bytes() for path in write_audit_figures(tmp_path)]
    assert first == [path.read_bytes() for path in write_audit_figures(tmp_path)]
    assert not any(b"<dc:date>" in each for each in first)
    write_audit(tmp_path, seed=1)
    assert first != [path.read_bytes() for path in write_audit_figures(tmp_path)]


def test_a_single_model_has_no_curves_and_leaves_none_of_an_earlier_run(tmp_path) -> None:
    write_audit(tmp_path)
    write_audit_figures(tmp_path)
    write_audit(tmp_path, 1)
    assert [path.name for path in write_audit_figures(tmp_path)] == NAMES[4:]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == NAMES[4:]
    write_audit(tmp_path, 1, what_if=[])
    assert write_audit_figures(tmp_path) == []


def test_settings_of_matplotlib_stay_and_pyplot_is_not_loaded(tmp_path) -> None:
    before = dict(mpl.rcParams)
    write_audit(tmp_path)
    write_audit_figures(tmp_path)
    assert dict(mpl.rcParams) == before
    source = (
        f"import sys\nfrom gradent.report import write_audit_figures\nwrite_audit_figures({str(tmp_path)!r})\n"
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_hostile_labels_are_drawn_without_a_warning(tmp_path) -> None:
    write_audit(tmp_path, hostile=EVIL + "屋$\\frac{$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = write_audit_figures(tmp_path)[-1].read_text("utf-8")
    assert "<script" not in svg and "\u202e" not in svg.replace("<!-- ", "")


def test_a_chart_as_a_table_and_in_words() -> None:
    lines = [
        Line("a", [0, 10], [1.0, float("nan")], [0.5, float("nan")]),
        Line("b", [10, 20], [0.1, 0.2], low=[0.0, 0.1], high=[0.3, 0.4]),
    ]
    chart = Chart("step", "share", lines, percent=True, title="Title", marks=[(10, "here")])
    table = tabulate_figure(chart)
    assert list(table.header) == ["step", "a", "b"]
    assert table.rows == [
        ["0", "100.0% ± 50.0%", "-"],
        ["10", "-", "10.0% (0.0% to 30.0%)"],
        ["20", "-", "20.0% (10.0% to 40.0%)"],
    ]
    assert describe_figure(chart) == (
        "Title (share over step). a: 100.0% at 0, 100.0% at 0. b: 10.0% at 10, 20.0% at 20. Marked at 10: here."
    )


def test_bars_and_heat_maps_as_tables() -> None:
    bars = Bars("loss", "share of pairs", ["x", "y"], [Series("up", [0.25, float("nan")], "ideal")], percent=True)
    assert tabulate_figure(bars).rows == [["x", "25.0%"], ["y", "-"]]
    assert describe_figure(bars) == "share of pairs by loss: 2 bars of up."
    heat = HeatMap("step", "layer", ["1", "2"], ["l"], [[0.5, float("nan")]], "part")
    assert tabulate_figure(heat).rows == [["l", "0.500", "-"]]
    large = HeatMap("b", "a", [str(n) for n in range(60)], [str(n) for n in range(60)], np.zeros((60, 60)), "cosine")
    assert tabulate_figure(large) is None


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (number(2230.4), "2,230"), (number(0), "0"), (number(1.2e-7), "1.2e-07"), (number(None), "-"),
        (signed_number(0.0415), "+0.0415"), (signed_number(-3), "-3.00"), (signed_number(float("nan")), "-"),
        (fixed(0.0624), "+0.062"), (fixed(None), "-"), (percent(0.2345), "23.4%"), (percent(None), "-"),
        (count(12345), "12,345"), (count(None), "-"), (change(1.0, 3.0, 0.25), "+2.00 ± 0.250"),
        (change(1.0, None), "-"), (change(1.0, 2.0, float("inf")), "+1.00"), (plural(1, "pair"), "1 pair"),
        (plural(2000, "pair"), "2,000 pairs"), (step_name(1200), "step 1,200"), (step_name(None), "an unknown step"),
    ],
)  # fmt: skip
def test_numbers_as_text(shown, text) -> None:
    assert shown == text
