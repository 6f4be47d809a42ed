"""The figure: a row a style, columns for log-probs, cosine and accuracy, a colour a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = {
    "DPO": "#2b2f36", "RPO 0.1": "#8a6fd1", "RPO": "#5a3fa0", "adaptive": "#c0392b", "CPO": "#c77400",
    "SimPO": "#b23a6f", "calibrated": "#12808a", "calibrated head": "#6fb7bd", "pairwise": "#1f6fb4",
    "masked": "#2f8f5b",
}  # fmt: skip
Row = dict[str, Any]


def draw(path: Path, rows: Iterable[Row], title: str) -> None:
    """Draw one data's runs with one optimizer.

    Args:
        path: the PNG.
        rows: of `records.COLUMNS`, phase "run".
        title: what is shown.
    """
    rows = list(rows)
    styles = list(dict.fromkeys(row["style"] for row in rows))
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.edgecolor": "#5b6672"}):
        figure = Figure(figsize=(12, 0.9 + 2.35 * len(styles)), layout="constrained")
        grid = figure.subplots(len(styles), 4, squeeze=False, sharex=True)
        for style, line in zip(styles, grid, strict=True):
            _draw_style(line, [row for row in rows if row["style"] == style])
            line[0].set_ylabel(f"{style}\n\nchange (nats)")
        for axes, name in zip(
            grid[0],
            ("log-prob of chosen", "log-prob of rejected", "cosine of the gradients", "accuracy, held out"),
            strict=True,
        ):
            axes.set_title(name)
        for axes in grid[-1]:
            axes.set_xlabel("step")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        figure.supxlabel(title, fontsize=8.5, color="#5b6672")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=95, facecolor="white", metadata={"Software": None})


def _draw_style(line: Iterable[Axes], rows: list[Row]) -> None:
    chosen, rejected, cosine, accuracy = line
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        _curve(chosen, mine, method, lambda row, start: row["chosen"] - start["chosen"])
        _curve(rejected, mine, method, lambda row, start: row["rejected"] - start["rejected"])
        _curve(cosine, mine, method, lambda row, start: row["cosine"])
        _curve(accuracy, mine, method, lambda row, start: row["label_right"])
        _curve(accuracy, mine, method, lambda row, start: row["preferred"], dashed=True)
    for axes in (chosen, rejected):
        axes.axhline(0, color="#8a94a0", linewidth=0.8, zorder=0)
    for axes in (chosen, rejected, cosine, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e9ed", linewidth=0.8)
        axes.set_axisbelow(True)
    cosine.set_ylim(-1.05, 1.05)
    low, high = accuracy.get_ylim()
    accuracy.set_ylim(min(low, high - 0.1), min(high, 1.005))


def _curve(
    axes: Axes, rows: list[Row], method: str, value: Callable[[Row, Row], float], *, dashed: bool = False
) -> None:
    """Mean over the seeds, and a band from the least to the largest."""
    steps = sorted({row["step"] for row in rows})
    starts = {row["seed"]: row for row in rows if row["step"] == steps[0]}
    table = np.array(
        [[value(row, starts[row["seed"]]) for row in rows if row["step"] == step] for step in steps]
    )  # [S, seeds]
    style = {"linestyle": ":", "linewidth": 1.4} if dashed else {"linewidth": 1.6, "label": method}
    if method == "DPO":  # what the others are held against shows on either side of a line that lies on it
        style |= {"linewidth": 4 * style["linewidth"] / 1.6, "alpha": 0.45}
    axes.plot(steps, table.mean(1), color=COLOURS[method], **style)
    if not dashed:
        axes.fill_between(steps, table.min(1), table.max(1), color=COLOURS[method], alpha=0.15, linewidth=0)
