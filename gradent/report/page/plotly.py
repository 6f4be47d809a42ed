"""Line charts, bars and heat maps as figures of plotly.js.

Colours are set in the page, which knows light from dark. plotly reads some HTML tags in its labels, so every label goes
through `_label`; a nan is a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from gradent.report.page.charts import Bars, Chart, HeatMap, Line
from gradent.text import printable

__all__ = ["bars_figure", "chart_figure", "heat_figure"]

_FEW = 6  # columns whose names may find room side by side
_LEAST_TEXT = 0.06  # of a whole: a piece of a bar that holds its own figure
_LONGEST = 30  # characters of a bar's name


def chart_figure(chart: Chart) -> dict[str, Any]:
    """Traces and layout of a chart."""
    traces: list[dict[str, Any]] = []
    for number, line in enumerate(chart.lines):
        x, colour = list(map(float, line.x)), line.colour or number
        low, high = line.edges()
        if len(low):
            band = {"x": x + x[::-1], "y": _gaps([*high, *reversed(low)]), "fill": "toself", "hoverinfo": "skip"}
            traces.append({**band, "line": {"width": 0}, "mode": "lines", "showlegend": False, "meta": colour})
        traces.append({"x": x, "y": _gaps(line.y), **_drawn(line, chart), "meta": colour})
    y_axis = {"title": {"text": _label(chart.y_label), "standoff": 12}, "zeroline": chart.zero, "automargin": True}
    if chart.percent:
        y_axis["tickformat"] = ".0%"
    if chart.stacked:
        y_axis["range"] = [0, 1] if chart.percent else None
    layout = {"xaxis": {"title": {"text": _label(chart.x_label)}, "zeroline": False}, "yaxis": y_axis}
    places = [float(x) for line in chart.lines for x in line.x]
    return {"data": traces, "layout": {**_marked(layout, chart.marks, places), "hovermode": "x unified"}}


def bars_figure(bars: Bars) -> dict[str, Any]:
    """Traces and layout of a chart of bars."""
    places, form = list(bars.places or range(len(bars.names))), ".1%" if bars.percent else ",.6~g"
    names = [_label(name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…") for name in bars.names]
    across, along = ("x", "y") if bars.upright else ("y", "x")
    traces = []
    for series in bars.series:
        values = _gaps(series.values)
        shown = f"%{{customdata}}<br>{_label(series.name)} %{{{along}:{form}}}<extra></extra>"
        trace: dict[str, Any] = {
            "type": "bar", across: places, along: values, "name": _label(series.name), "meta": series.colour,
            "hovertemplate": shown, "orientation": "v" if bars.upright else "h", "customdata": names,
        }  # fmt: skip
        if bars.percent:
            trace |= {"text": [_piece(value) for value in values], "textposition": "inside", "textangle": 0}
            trace["insidetextanchor"] = "middle"
        traces.append(trace)
    value_axis: dict[str, Any] = {"title": {"text": _label(bars.value_label)}, "zeroline": False}
    value_axis |= {"tickformat": ".0%", "range": [0, 1]} if bars.percent else {}
    name_axis: dict[str, Any] = {"automargin": True, "zeroline": False}
    name_axis |= {} if bars.places else {"tickvals": places, "ticktext": names}
    name_axis |= {"title": {"text": _label(bars.label)}} if bars.upright else {"autorange": "reversed"}
    axes = {f"{across}axis": {**name_axis, "showgrid": False}, f"{along}axis": value_axis}
    layout = {
        **axes,
        "barmode": "stack",
        "bargap": 0.05 if bars.upright else 0.3,
        "hovermode": "closest",
        "uniformtext": {"minsize": 9, "mode": "hide"},
    }
    return {"data": traces, "layout": {**layout, "showlegend": len(bars.series) > 1}}


def heat_figure(heat: HeatMap) -> dict[str, Any]:
    """Trace and layout of a heat map."""
    name, x_label, y_label = _label(heat.name), _label(heat.x_label), _label(heat.y_label)
    trace = {
        "type": "heatmap",
        "x": [_label(each) for each in heat.columns],
        "y": [_label(each) for each in heat.rows],
        "z": [_gaps([round(value, 4) for value in row]) for row in heat.values],
        "zmin": -heat.limit,
        "zmax": heat.limit,
        "hoverongaps": False,
        "hovertemplate": f"{y_label} %{{y}}<br>{x_label} %{{x}}<br>{name} %{{z:.3f}}<extra></extra>",
        "colorbar": {
            "title": {"text": name, "side": "top"}, "orientation": "h", "thickness": 10, "len": 0.5, "x": 0,
            "xanchor": "left", "y": 1.01, "yanchor": "bottom", "tickformat": ".3~g", "outlinewidth": 0,
            "tickvals": [part * heat.limit for part in (-1, 0, 1)],
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


def _label(text: str) -> str:
    """A text as plotly shows it: plotly reads some tags and entities in its labels."""
    return escape(printable(text), quote=False)


def _drawn(line: Line, chart: Chart) -> dict[str, Any]:
    """How a line looks, and what is said where it is pointed at."""
    name, form = _label(line.name), ".1%" if chart.percent else ".4~g" if line.dashed else ".3f"
    style: dict[str, Any] = {"name": name, "hovertemplate": f"%{{y:{form}}}<extra>{name}</extra>"}
    if chart.stacked:
        return {**style, "mode": "lines", "stackgroup": "all", "line": {"width": 0.5}}
    if line.dashed:
        return {**style, "mode": "lines", "line": {"width": 1.25, "dash": "dot"}}
    return {**style, "mode": "lines+markers"}


def _marked(layout: dict[str, Any], marks: Sequence[tuple[float, str]], places: Sequence[float]) -> dict[str, Any]:
    """Upright lines with their texts, each text a line lower than the one before and inside the range of x."""
    if not marks:
        return layout
    every = [*places, *(x for x, _ in marks)]
    low, high = min(every), max(every)
    room = (high - low or 1.0) / 20
    layout["xaxis"]["range"] = [low - room, high + room]
    shapes = [
        {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1, "dash": "dash"}}
        for x, _ in marks
    ]
    annotations = [
        {
            "x": x, "yref": "paper", "y": 1 - 0.09 * number, "yanchor": "top", "text": _label(text), "showarrow": False,
            "xanchor": "right" if x > (low + high) / 2 else "left", "xshift": -4 if x > (low + high) / 2 else 4,
            "font": {"size": 12},
        }
        for number, (x, text) in enumerate(marks)
    ]  # fmt: skip
    return {**layout, "shapes": shapes, "annotations": annotations}


def _piece(value: float | None) -> str:
    return "" if value is None or value < _LEAST_TEXT else f"{value:.0%}"


def _gaps(values: Sequence[float]) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
