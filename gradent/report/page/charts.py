"""What figures of a report are: line charts, bars, heat maps. How they are drawn stands in `plotly_figure`.

A nan is a gap everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bars", "Chart", "HeatMap", "Line", "Series"]


@dataclass(frozen=True)
class Line:
    """One line of a chart; nan leaves a gap.

    Attributes:
        name: of the line.
        x: as many as `y`.
        y: the values.
        band: half the width of a band around `y`; empty for none.
        low: lower edge of a band that is not even around `y`, with `high`; empty for none.
        high: its upper edge.
        colour: a colour of the page by its name (`chosen`, `both_down`, ...); empty for the line's own number.
        dashed: thin and broken, without points: what stands beside the thing measured.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: str = ""
    dashed: bool = False

    def edges(self) -> tuple[Sequence[float], Sequence[float]]:
        """Lower and upper edge of the band; empty where there is none.

        Returns:
            Two sequences as long as `y`, or two empty ones.
        """
        if len(self.band):
            halves = list(zip(self.y, self.band, strict=True))
            return [y - half for y, half in halves], [y + half for y, half in halves]
        return self.low, self.high


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis.

    Attributes:
        x_label: with its unit.
        y_label: with its unit.
        lines: in order.
        zero: draw the line y = 0.
        title: above the chart; empty for none.
        percent: values are shares of 1.
        stacked: lines are parts of one whole, one on top of the other.
        marks: `(x, text)` of upright lines.
    """

    x_label: str
    y_label: str
    lines: Sequence[Line]
    zero: bool = False
    title: str = ""
    percent: bool = False
    stacked: bool = False
    marks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Series:
    """One kind of piece in a chart of bars: a name, a value each bar (nan for none), a colour of the page by name."""

    name: str
    values: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Bars:
    """Bars made of pieces, one on the other.

    Attributes:
        label: of a bar.
        value_label: of the values, with their unit.
        names: a name each bar.
        series: the pieces, each with a value a bar.
        title: above the chart; empty for none.
        percent: values are shares of 1, and a bar goes up to 1.
        upright: bars stand; else they lie, with room for long names.
        places: where the bars stand on an axis of numbers; empty for one after the other, each with its name.
    """

    label: str
    value_label: str
    names: Sequence[str]
    series: Sequence[Series]
    title: str = ""
    percent: bool = False
    upright: bool = False
    places: Sequence[float] = ()


@dataclass(frozen=True)
class HeatMap:
    """A matrix in colours from one sign over 0 to the other, its rows downwards.

    Attributes:
        x_label: of the columns.
        y_label: of the rows.
        columns: a name each, no two alike.
        rows: a name each, no two alike.
        values: one sequence a row; nan leaves a gap.
        name: what a value is.
        marked: `(row, column)` of entries with an outline.
        limit: where the colours end; values beyond have the last one.
        title: above the map; empty for none.
    """

    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]
    name: str
    marked: Sequence[tuple[int, int]] = ()
    limit: float = 1.0
    title: str = ""
