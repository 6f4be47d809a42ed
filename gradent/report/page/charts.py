"""What figures of a report are: line charts, bars, heat maps. How they are drawn stands in `plotly_figure`.

A nan is a gap everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bars", "Chart", "HeatMap", "Line", "Series"]


@dataclass(frozen=True)
class Line:
    """One line of a chart; nan leaves a gap."""

    name: str  # of the line
    x: Sequence[float]  # as many as `y`
    y: Sequence[float]  # the values
    band: Sequence[float] = ()  # half the width of a band around `y`; empty for none
    low: Sequence[float] = ()  # lower edge of a band that is not even around `y`, with `high`; empty for none
    high: Sequence[float] = ()  # its upper edge
    colour: str = ""  # a colour of the page by its name (`chosen`, `both_down`, ...); empty for the line's own number
    dashed: bool = False  # thin and broken, without points: what stands beside the thing measured

    def edges(self) -> tuple[Sequence[float], Sequence[float]]:
        """Lower and upper edge of the band; empty where there is none."""
        if len(self.band):
            halves = list(zip(self.y, self.band, strict=True))
            return [y - half for y, half in halves], [y + half for y, half in halves]
        return self.low, self.high


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis."""

    x_label: str  # with its unit
    y_label: str  # with its unit
    lines: Sequence[Line]  # in order
    zero: bool = False  # draw the line y = 0
    title: str = ""  # above the chart; empty for none
    percent: bool = False  # values are shares of 1
    stacked: bool = False  # lines are parts of one whole, one on top of the other
    marks: Sequence[tuple[float, str]] = ()  # `(x, text)` of upright lines


@dataclass(frozen=True)
class Series:
    """One kind of piece in a chart of bars: a name, a value each bar (nan for none), a colour of the page by name."""

    name: str
    values: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Bars:
    """Bars made of pieces, one on the other."""

    label: str  # of a bar
    value_label: str  # of the values, with their unit
    names: Sequence[str]  # a name each bar
    series: Sequence[Series]  # the pieces, each with a value a bar
    title: str = ""  # above the chart; empty for none
    percent: bool = False  # values are shares of 1, and a bar goes up to 1
    upright: bool = False  # bars stand; else they lie, with room for long names
    # where the bars stand on an axis of numbers; empty for one after the other, each with its name
    places: Sequence[float] = ()


@dataclass(frozen=True)
class HeatMap:
    """A matrix in colours from one sign over 0 to the other, its rows downwards."""

    x_label: str  # of the columns
    y_label: str  # of the rows
    columns: Sequence[str]  # a name each, no two alike
    rows: Sequence[str]  # a name each, no two alike
    values: Sequence[Sequence[float]]  # one sequence a row; nan leaves a gap
    name: str  # what a value is
    marked: Sequence[tuple[int, int]] = ()  # `(row, column)` of entries with an outline
    limit: float = 1.0  # where the colours end; values beyond have the last one
    title: str = ""  # above the map; empty for none
