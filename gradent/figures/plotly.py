"""Charts, bars and heat maps as figures of plotly.js: for a page, which colours them, or on their own.

plotly reads some HTML tags in its labels, so every label goes through `_label`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from gradent.figures.charts import COLOURS, Bars, Chart, Figure, HeatMap, Line
from gradent.text import printable

__all__ = ["draw_plotly", "plotly_json"]

_FEW = 6  # columns whose names may find room side by side
_LEAST_TEXT = 0.06  # of 1: a piece of a bar that holds its own figure
_LONGEST = 30  # characters of a bar's name
_TEXT = "#1c2127"
_NUMBERED = ("#1f6fb4", "#c77400", "#b23a6f", "#5a4fb5")  # colours of lines without a named one
_GAP = "#c4c9cf"  # behind a heat map: no value is of this colour
_DIVERGING = [[0, "#266fbf"], [0.5, "#f7f7f7"], [1, "#cb342a"]]


def plotly_json(figure: Figure) -> dict[str, Any]:
    """Traces and layout without colours; each trace's `meta` is its colour: a name, or the number of its line."""
    if isinstance(figure, Chart):
        return _chart(figure)
    return _bars(figure) if isinstance(figure, Bars) else _heat_map(figure)


def draw_plotly(figure: Figure) -> Any:
    """A `plotly.graph_objects.Figure` in colours of its own, with its title; raises ImportError without plotly."""
    from plotly.graph_objects import Figure as Drawing  # noqa: PLC0415  (an extra)

    content = plotly_json(figure)
    for trace in content["data"]:
        _colour(trace)
    for shape in content["layout"].get("shapes", ()):
        shape["line"]["color"] = _TEXT
    ground = {"plot_bgcolor": _GAP} if isinstance(figure, HeatMap) else {}
    drawing = Drawing(content["data"], {**content["layout"], **ground, "title": {"text": _label(figure.title)}})
    drawing.layout.template = None  # the default one is 7 kB in every figure
    return drawing


def _colour(trace: dict[str, Any]) -> None:
    """What `dress` in page.js does, with the colours of a light page."""
    if trace.get("type") == "heatmap":
        trace["colorscale"] = _DIVERGING
        return
    meta = trace["meta"]
    colour = _NUMBERED[meta % len(_NUMBERED)] if isinstance(meta, int) else COLOURS.get(meta, _NUMBERED[0])
    trace["marker"] = {"color": colour}
    if trace.get("type") != "bar":
        trace["line"] = {"color": colour, **trace.get("line", {})}
        if "stackgroup" in trace:
            trace["fillcolor"] = colour
        elif "fill" in trace:
            red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
            trace["fillcolor"] = f"rgba({red}, {green}, {blue}, 0.15)"


def _chart(chart: Chart) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for number, line in enumerate(chart.lines):
        x, colour = list(map(float, line.x)), line.colour or number
        low, high = line.edges()
        if len(low):
            band = {"x": x + x[::-1], "y": _gaps([*high, *reversed(low)]), "fill": "toself", "hoverinfo": "skip"}
            traces.append({**band, "line": {"width": 0}, "mode": "lines", "showlegend": False, "meta": colour})
        traces.append({"x": x, "y": _gaps(line.y), **_style(line, chart), "meta": colour})
    y_axis = {"title": {"text": _label(chart.y_label), "standoff": 12}, "zeroline": chart.zero, "automargin": True}
    if chart.percent:
        y_axis["tickformat"] = ".0%"
    if chart.stacked:
        y_axis["range"] = [0, 1] if chart.percent else None
    layout = {"xaxis": {"title": {"text": _label(chart.x_label)}, "zeroline": False}, "yaxis": y_axis}
    places = [float(x) for line in chart.lines for x in line.x]
    hovermode = "closest" if any(line.points for line in chart.lines) else "x unified"
    return {"data": traces, "layout": {**_marked(layout, chart.marks, places), "hovermode": hovermode}}


def _style(line: Line, chart: Chart) -> dict[str, Any]:
    """How a line looks, and what is said where it is pointed at."""
    name, form = _label(line.name), ".1%" if chart.percent else ".4~g" if line.dashed else ".3f"
    style: dict[str, Any] = {"name": name, "hovertemplate": f"%{{y:{form}}}<extra>{name}</extra>"}
    if chart.stacked:
        return {**style, "mode": "lines", "stackgroup": "all", "line": {"width": 0.5}}
    if line.dashed:
        return {**style, "mode": "lines", "line": {"width": 1.25, "dash": "dot"}}
    return {**style, "mode": "markers" if line.points else "lines+markers"}


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


def _bars(bars: Bars) -> dict[str, Any]:
    """Without `places`, bars stand at whole numbers, which bear their names: two of one name stay two."""
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
            texts = ["" if value is None or value < _LEAST_TEXT else f"{value:.0%}" for value in values]
            trace |= {"text": texts, "textposition": "inside", "textangle": 0, "insidetextanchor": "middle"}
        traces.append(trace)
    value_axis: dict[str, Any] = {"title": {"text": _label(bars.value_label)}, "zeroline": False}
    value_axis |= {"tickformat": ".0%", "range": [0, 1]} if bars.percent else {}
    name_axis: dict[str, Any] = {"automargin": True, "zeroline": False}
    name_axis |= {} if bars.places else {"tickvals": places, "ticktext": names}
    name_axis |= {"title": {"text": _label(bars.label)}} if bars.upright else {"autorange": "reversed"}
    layout = {
        f"{across}axis": {**name_axis, "showgrid": False}, f"{along}axis": value_axis, "barmode": "relative",
        "bargap": 0.05 if bars.upright else 0.3, "hovermode": "closest", "uniformtext": {"minsize": 9, "mode": "hide"},
    }  # fmt: skip
    return {"data": traces, "layout": {**layout, "showlegend": len(bars.series) > 1}}


def _heat_map(heat: HeatMap) -> dict[str, Any]:
    """Values are rounded to four decimals."""
    name, x_label, y_label = _label(heat.name), _label(heat.x_label), _label(heat.y_label)
    has_names = all(isinstance(column, str) for column in heat.columns)
    trace = {
        "type": "heatmap", "x": [_label(column) if isinstance(column, str) else column for column in heat.columns],
        "y": [_label(row) for row in heat.rows],
        "z": [[value if value is None else round(value, 4) for value in _gaps(row)] for row in heat.values],
        "zmin": -heat.limit, "zmax": heat.limit, "hoverongaps": False,
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
    x_axis = axis if has_names else {**axis, "type": "linear"}
    turned = {"tickangle": -90} if has_names and len(heat.columns) > _FEW else {}
    layout = {
        "xaxis": {**x_axis, **turned, "title": {"text": x_label, "standoff": 24}},
        "yaxis": {**axis, "title": {"text": y_label, "standoff": 12}, "autorange": "reversed"},
    }
    return {"data": [trace], "layout": {**layout, "hovermode": "closest", "shapes": outlines}}


def _label(text: str) -> str:
    """A text as plotly shows it: plotly reads some tags and entities in its labels."""
    return escape(printable(text), quote=False)


def _gaps(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None or not math.isfinite(value) else float(value) for value in values]
