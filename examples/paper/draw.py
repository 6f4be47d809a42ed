"""PNG and CSV of what was measured."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["Panel", "draw_cases", "draw_panels", "series", "write_rows"]

CHOSEN, REJECTED = "#1f6fb4", "#c0392b"
CASES = {
    "ideal": "#2f8f5b", "both_down": "#c77400", "both_up": "#7f8fd1", "reversed": "#b23a6f", "inactive": "#c9ced4",
}  # fmt: skip
_QUIET: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.edgecolor": "#5b6672"}
Row = dict[str, Any]
Series = dict[int, list[float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        lines: label to colour and values by step, one a seed.
        unit: beside the axis.
    """

    title: str
    lines: Mapping[str, tuple[str, Series]]
    unit: str


def series(rows: Iterable[Row], column: str) -> Series:
    """A column by step.

    Args:
        rows: with `step`.
        column: its name.

    Returns:
        Step to values, one a seed.
    """
    found: Series = {}
    for row in rows:
        found.setdefault(row["step"], []).append(row[column])
    return found


def draw_panels(path: Path, panels: Sequence[Panel], title: str, *, columns: int = 5) -> None:
    """Draw curves, mean and range over the seeds.

    Args:
        path: the PNG.
        panels: what is drawn.
        title: under it.
        columns: panels a row, at most.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(_QUIET):
        # A single panel is as wide as the line under it needs.
        figure = Figure(figsize=(max(1.2 + 2.5 * columns, 8.6), 0.8 + 2.2 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        handles, labels = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda both: len(both[1]))
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        _save(figure, path, title)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for label, (colour, values) in panel.lines.items():
        steps = sorted(values)
        table = [np.array(values[step]) for step in steps]
        axes.plot(steps, [each.mean() for each in table], color=colour, linewidth=1.7, label=label)
        axes.fill_between(
            steps, [each.min() for each in table], [each.max() for each in table], color=colour, alpha=0.18, linewidth=0
        )
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)


def draw_cases(path: Path, groups: Mapping[str, Sequence[Row]], title: str) -> None:
    """Draw the shares of the cases over the steps, means over the seeds.

    Args:
        path: the PNG.
        groups: name to rows.
        title: under it.
    """
    with mpl.rc_context(_QUIET):
        figure = Figure(figsize=(1.2 + 2.5 * len(groups), 3.0), layout="constrained")
        grid = figure.subplots(1, len(groups), squeeze=False, sharey=True)
        for axes, (name, rows) in zip(grid.flat, groups.items(), strict=True):
            steps = sorted(series(rows, "ideal"))
            shares = [[float(np.mean(series(rows, case)[step])) for step in steps] for case in CASES]
            axes.stackplot(steps, shares, labels=[case.replace("_", " ") for case in CASES], colors=CASES.values())
            axes.set_title(name)
            axes.set_xlabel("step")
            axes.set_ylim(0, 1)
        grid[0, 0].set_ylabel("share of the pairs")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        _save(figure, path, title)


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.supxlabel(title, fontsize=8.5, color="#5b6672")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV; floats with 6 digits.

    Args:
        path: the file.
        rows: of equal keys.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )
