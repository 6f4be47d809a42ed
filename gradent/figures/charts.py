"""What figures are: line charts, bars, heat maps. Each is described once, and drawn by `plotly` and by `canvas`.

A nan is a gap everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["COLOURS", "DARK", "Bars", "Chart", "Figure", "HeatMap", "Line", "Series", "fill_gap", "token_cosines"]

COLOURS: dict[str, str] = {
    "chosen": "#1f6fb4", "rejected": "#c77400", "ideal": "#2a9d8f", "both_down": "#e76f51", "both_up": "#e9c46a",
    "reversed": "#9b2226", "inactive": "#adb5bd",
    "own": "#2a9d8f", "partner": "#c77400", "others_chosen": "#1f6fb4", "others_rejected": "#b23a6f",
    "earlier_batches": "#8d6cab", "momentum": "#6c757d", "weight_decay": "#adb5bd", "step": "#6c757d",
    "positives": "#1f6fb4", "negatives": "#c77400", "other_groups": "#b23a6f",
}  # fmt: skip
"""Colours by name, where no page brings its own (which know light from dark)."""

DARK = frozenset({"ideal", "reversed"})
"""Colours on which white is read."""


@dataclass(frozen=True)
class Line:
    """One line of a chart; nan leaves a gap."""

    name: str
    x: Sequence[float]  # as many as `y`
    y: Sequence[float]
    band: Sequence[float] = ()  # half the width of a band around `y`; empty for none
    low: Sequence[float] = ()  # lower edge of a band that is not even around `y`, with `high`; empty for none
    high: Sequence[float] = ()
    colour: str = ""  # a colour by its name (`chosen`, `both_down`, ...); empty for the line's own number
    dashed: bool = False  # thin and broken, without points: what stands beside the thing measured
    points: bool = False  # points without a line

    def edges(self) -> tuple[Sequence[float], Sequence[float]]:
        """Lower and upper edge of the band; empty where there is none."""
        if len(self.band):
            halves = list(zip(self.y, self.band, strict=True))
            return [y - half for y, half in halves], [y + half for y, half in halves]
        return self.low, self.high


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis; labels are with their units."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    zero: bool = False  # draw the line y = 0
    title: str = ""  # above the chart; empty for none
    percent: bool = False  # values are shares of 1
    stacked: bool = False  # lines are parts of a sum, one on top of the other
    marks: Sequence[tuple[float, str]] = ()  # `(x, text)` of upright lines

    @property
    def is_curve(self) -> bool:
        """Whether a line goes from one x to another."""
        return any(len(set(line.x)) > 1 for line in self.lines)


@dataclass(frozen=True)
class Series:
    """One kind of piece in a chart of bars: a name, a value each bar (nan for none), a colour by its name."""

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
    places: Sequence[float] = ()  # of the bars on an axis of numbers; empty for one after the other


@dataclass(frozen=True)
class HeatMap:
    """A matrix in colours from one sign over 0 to the other, its rows downwards."""

    x_label: str
    y_label: str
    columns: Sequence[str] | Sequence[float]  # a name each, no two alike; or places on an axis of numbers
    rows: Sequence[str]  # a name each, no two alike
    values: Sequence[Sequence[float | None]]  # one sequence a row; nan or None leaves a gap
    name: str  # what a value is
    marked: Sequence[tuple[int, int]] = ()  # `(row, column)` of entries with an outline
    limit: float = 1.0  # where the colours end; values beyond have the last one
    title: str = ""  # above the map; empty for none


Figure = Chart | Bars | HeatMap


def token_cosines(
    chosen: Sequence[str], rejected: Sequence[str], cosines: Sequence[Sequence[float | None]],
    alignment: Sequence[tuple[int, int]] = (), title: str = "",
) -> HeatMap:  # fmt: skip
    """Cosines of the gradients of T_w chosen and T_l rejected tokens, `[T_w, T_l]`; aligned tokens are outlined."""
    return HeatMap("rejected", "chosen", rejected, chosen, cosines, "cosine", marked=alignment, title=title)


def fill_gap(value: float | None) -> float:
    """A number of a record as figures have it: nan where there is none."""
    return float("nan") if value is None else float(value)
