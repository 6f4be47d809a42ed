"""Line charts and heat maps as figures of plotly.js.

Colours are set in the page, which knows light from dark. plotly reads some HTML tags in its labels, so every label goes
through `plain`; a nan is a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradent.token_text import readable

__all__ = ["Chart", "HeatMap", "Line", "chart_figure", "heat_figure", "plain"]

_FEW = 6  # columns whose names may find room side by side


@dataclass(frozen=True)
class Line:
    """One line of a chart: x and y of equal length, and the half width of a band around y; nan leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis; `zero` draws the line y = 0."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    zero: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A matrix in colours from -1 over 0 to 1, its rows downwards.

    Attributes:
        x_label: of the columns.
        y_label: of the rows.
        columns: a name each, no two alike.
        rows: a name each, no two alike.
        values: one sequence a row; nan leaves a gap.
        name: what a value is.
        marked: `(row, column)` of entries with an outline.
    """

    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]
    name: str
    marked: Sequence[tuple[int, int]] = ()


def chart_figure(chart: Chart) -> dict[str, Any]:
    """Traces and layout of a chart.

    Args:
        chart: the chart.

    Returns:
        What plotly.js draws; each trace's `meta` is the number of its line, for its colour.
    """
    traces: list[dict[str, Any]] = []
    for number, line in enumerate(chart.lines):
        x = list(map(float, line.x))
        if len(line.band):
            upper = [y + half for y, half in zip(line.y, line.band, strict=True)]
            lower = [y - half for y, half in zip(line.y, line.band, strict=True)]
            band = {"x": x + x[::-1], "y": _gaps(upper + lower[::-1]), "fill": "toself", "hoverinfo": "skip"}
            traces.append({**band, "line": {"width": 0}, "mode": "lines", "showlegend": False, "meta": number})
        name = plain(line.name)
        shown = "%{y:.3f}<extra>" + name + "</extra>"
        traces.append(
            {"x": x, "y": _gaps(line.y), "name": name, "mode": "lines+markers", "hovertemplate": shown, "meta": number}
        )
    y_axis = {"title": {"text": plain(chart.y_label), "standoff": 12}, "zeroline": chart.zero, "automargin": True}
    layout = {"xaxis": {"title": {"text": plain(chart.x_label)}, "zeroline": False}, "yaxis": y_axis}
    return {"data": traces, "layout": {**layout, "hovermode": "x unified"}}


def heat_figure(heat: HeatMap) -> dict[str, Any]:
    """Trace and layout of a heat map.

    Args:
        heat: the heat map.

    Returns:
        What plotly.js draws; values are rounded to four decimals.
    """
    name, x_label, y_label = plain(heat.name), plain(heat.x_label), plain(heat.y_label)
    trace = {
        "type": "heatmap",
        "x": [plain(each) for each in heat.columns],
        "y": [plain(each) for each in heat.rows],
        "z": [_gaps([round(value, 4) for value in row]) for row in heat.values],
        "zmin": -1,
        "zmax": 1,
        "hoverongaps": False,
        "hovertemplate": f"{y_label} %{{y}}<br>{x_label} %{{x}}<br>{name} %{{z:.3f}}<extra></extra>",
        "colorbar": {
            "title": {"text": name, "side": "top"}, "orientation": "h", "thickness": 10, "len": 0.5, "x": 0,
            "xanchor": "left", "y": 1.01, "yanchor": "bottom", "tickvals": [-1, -0.5, 0, 0.5, 1], "outlinewidth": 0,
        },
    }  # fmt: skip
    axis = {"type": "category", "automargin": True, "showgrid": False, "zeroline": False, "tickfont": {"size": 11}}
    outlines = [
        {"type": "rect", "x0": b - 0.5, "x1": b + 0.5, "y0": a - 0.5, "y1": a + 0.5, "line": {"width": 1.2}}
        for a, b in heat.marked
    ]
    turned = {"tickangle": -90} if len(heat.columns) > _FEW else {}
    layout = {
        "xaxis": {**axis, **turned, "title": {"text": x_label, "standoff": 24}},
        "yaxis": {**axis, "title": {"text": y_label, "standoff": 12}, "autorange": "reversed"},
        "hovermode": "closest",
        "shapes": outlines,
    }
    return {"data": [trace], "layout": layout}


def plain(text: str) -> str:
    """A text as plotly is to show it: it reads some tags and entities in its labels, and without these letters not.

    Args:
        text: any text.

    Returns:
        The text with `&`, `<` and `>` as entities, and control characters written out.
    """
    return readable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _gaps(values: Sequence[float]) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
