"""Charts and bars drawn by matplotlib, on canvases of their own: pyplot and its figures are not touched."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from gradent.errors import InputError
from gradent.figures.charts import COLOURS, DARK, Bars, Chart
from gradent.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_figure", "escape_missing", "letters_of", "new_figure", "render"]

_WIDTH, _HEIGHT, _BAR, _DPI = 6.4, 3.6, 0.3, 200  # inches, and dots to one
_LABEL = 34  # characters of a bar's name
_LEAST_TEXT = 0.06  # share from which a piece of a bar holds its figure
_FONT = "DejaVu Sans"  # comes with matplotlib, so that files do not hang on a machine's fonts
_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def new_figure(dpi: int, **options: Any) -> Figure:
    """An empty white figure; raises `InputError` where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"Pictures need matplotlib, and {error.name} is not installed. Install the extra: "
            'pip install "gradent[audit]".'
        ) from error
    figure = Figure(dpi=dpi, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def draw_figure(figure: Chart | Bars) -> Figure:
    """Draw a chart whose lines have named colours, or bars that lie; titles are left to the text around it."""
    height = _HEIGHT if isinstance(figure, Chart) else 1.3 + _BAR * len(figure.names)
    drawing = new_figure(_DPI, figsize=(_WIDTH, height), layout="constrained")
    axes = drawing.add_subplot()
    axes.set_facecolor("white")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if isinstance(figure, Bars):
        _draw_bars(axes, figure)
        labels = figure.value_label, ""
    else:
        (_draw_stack if figure.stacked else _draw_lines)(axes, figure)
        labels = figure.x_label, figure.y_label
    for axis, label in zip((axes.xaxis, axes.yaxis), labels, strict=True):
        axis.set_label_text(label, fontsize=9, fontfamily=_FONT)
        for tick in axis.get_ticklabels():
            tick.set(fontsize=8, fontfamily=_FONT)
    axes.grid(visible=False)
    style: dict[str, Any] = {"frameon": False, "prop": {"family": _FONT, "size": 8}}
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, **style)
    return drawing


def render(figure: Figure, form: str) -> bytes:
    """The content of a .png or .svg file: no date in it, and the same bytes for the same figure."""
    from matplotlib import rc_context  # noqa: PLC0415

    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "gradent", "svg.fonttype": "path"}):  # names inside an SVG that do not change
        figure.savefig(content, format=form, metadata=_METADATA[form])
    return content.getvalue()


def letters_of(*files: str) -> frozenset[int]:
    """The characters that some font files have."""
    from matplotlib import font_manager  # noqa: PLC0415

    return frozenset(number for file in files for number in font_manager.get_font(file).get_charmap())


def escape_missing(text: str, letters: frozenset[int]) -> str:
    r"""Characters that no font has by their numbers, `\u5c4b`: an empty box would tell nothing."""
    return "".join(letter if ord(letter) in letters else letter.encode("unicode_escape").decode() for letter in text)


def _draw_lines(axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        style: dict[str, Any] = {"marker": "o", "markersize": 3}
        style = {"linewidth": 0.9, "linestyle": ":"} if line.dashed else style
        axes.plot(line.x, line.y, color=COLOURS[line.colour], label=line.name, **style)
        low, high = line.edges()
        if len(low):
            axes.fill_between(line.x, low, high, color=COLOURS[line.colour], alpha=0.15, linewidth=0)
    for x, text in chart.marks:
        axes.axvline(x, color="#5b6672", linewidth=0.8, linestyle="--", label=text)


def _draw_stack(axes: Axes, chart: Chart) -> None:
    x, colours = chart.lines[0].x, [COLOURS[line.colour] for line in chart.lines]
    axes.stackplot(x, [line.y for line in chart.lines], labels=[line.name for line in chart.lines], colors=colours)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, 1)
    _show_percent(axes.yaxis)


def _draw_bars(axes: Axes, bars: Bars) -> None:
    from matplotlib import font_manager  # noqa: PLC0415

    places, left = list(range(len(bars.names))), [0.0] * len(bars.names)
    for series in bars.series:
        values = [value if math.isfinite(value) else 0.0 for value in series.values]
        axes.barh(places, values, left=left, color=COLOURS[series.colour], label=series.name, height=0.7)
        for place, value in zip(places, values, strict=True):
            if value >= _LEAST_TEXT:
                colour, middle = "white" if series.colour in DARK else "black", left[place] + value / 2
                axes.text(middle, place, f"{value:.0%}", color=colour, fontsize=7, ha="center", va="center")
        left = [start + value for start, value in zip(left, values, strict=True)]
    letters = letters_of(font_manager.findfont(_FONT))
    names = [escape_missing(visible(name, space=" "), letters) for name in bars.names]
    names = [name if len(name) <= _LABEL else name[: _LABEL - 1] + "…" for name in names]
    axes.set_yticks(places, names, parse_math=False)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    _show_percent(axes.xaxis)


def _show_percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
