"""Figures for those who do not see them: each as a table of its numbers, and in a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import zip_longest

from gradent.figures.charts import Bars, Chart, Figure, HeatMap, Line
from gradent.report.page.numbers import NOTHING, count, number, percent
from gradent.report.page.parts import Table

__all__ = ["describe_figure", "tabulate_figure"]

_MOST_CELLS = 2500  # of a table that a figure brings along
_FOLDED = "The numbers of this figure"


def tabulate_figure(figure: Figure) -> Table | None:
    """A figure's numbers."""
    if isinstance(figure, Chart):
        header, rows = _chart_rows(figure)
    elif isinstance(figure, Bars):
        header = [figure.label, *(series.name for series in figure.series)]
        whole = all(float(value).is_integer() for series in figure.series for value in series.values)
        shown = percent if figure.percent else count if whole else number
        columns = [map(shown, series.values) for series in figure.series]
        rows = [[name, *values] for name, *values in zip(figure.names, *columns, strict=True)]
    else:
        header = [figure.y_label, *map(str, figure.columns)]
        if len(figure.rows) * len(header) > _MOST_CELLS:
            return None
        rows = [[name, *map(number, row)] for name, row in zip(figure.rows, figure.values, strict=True)]
    if len(rows) * len(header) > _MOST_CELLS:
        return None
    return Table(header, rows, _FOLDED, _name(figure), figures_from=1)


def describe_figure(figure: Figure) -> str:
    """What a figure shows, in words: axes, and of each line or piece where it starts and ends."""
    name = _name(figure)
    if isinstance(figure, HeatMap):
        return f"{name}: {figure.y_label} by {figure.x_label}"
    if isinstance(figure, Bars):
        return f"{name}: {len(figure.names)} bars of {', '.join(series.name for series in figure.series)}."
    shown = percent if figure.percent else number
    parts = [f"{name}."]
    for line in figure.lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        if points:
            (first, start), (last, end) = points[0], points[-1]
            parts.append(f"{line.name}: {shown(start)} at {_place(first)}, {shown(end)} at {_place(last)}.")
    return " ".join(parts + [f"Marked at {_place(x)}: {text}." for x, text in figure.marks])


def _name(figure: Figure) -> str:
    if isinstance(figure, Chart):
        axes = f"{figure.y_label} over {figure.x_label}"
    elif isinstance(figure, Bars):
        axes = f"{figure.value_label} by {figure.label}"
    else:
        axes = figure.name
    return f"{figure.title} ({axes})" if figure.title else axes


def _chart_rows(chart: Chart) -> tuple[list[str], list[list[str]]]:
    shown = percent if chart.percent else number
    cells = [dict(zip(line.x, _line_cells(line, shown), strict=True)) for line in chart.lines]
    places = sorted({x for column in cells for x in column})
    rows = [[_place(x), *(column.get(x, NOTHING) for column in cells)] for x in places]
    return [chart.x_label, *(line.name for line in chart.lines)], rows


def _line_cells(line: Line, shown: Callable[[float], str]) -> Iterator[str]:
    """Each value of a line, with its band where there is one."""
    for y, low, high in zip_longest(line.y, *line.edges(), fillvalue=math.nan):
        if not (math.isfinite(low) and math.isfinite(high)):
            yield shown(y)
        elif len(line.band):
            yield f"{shown(y)} ± {shown((high - low) / 2)}"
        else:
            yield f"{shown(y)} ({shown(low)} to {shown(high)})"


def _place(x: float) -> str:
    return f"{x:,.0f}" if x == int(x) else number(x)
