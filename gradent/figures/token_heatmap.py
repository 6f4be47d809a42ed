r"""The picture of one pair's token matrix: a heat map of cosines, and each token's entanglement beside it.

It is drawn on a canvas of its own: pyplot, its backend and its open figures are not touched. The fonts are those of
matplotlib's settings; a character that none of them has is written as `\u5c4b`.

Letters: T_w and T_l completion tokens of chosen and rejected; a a chosen token, b a rejected one.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradent.errors import InputError
from gradent.figures.canvas import escape_missing, letters_of, new_figure
from gradent.figures.charts import HeatMap
from gradent.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["TokenPicture", "draw_tokens", "write_figure"]

Floats = NDArray[np.float64]

# Inches.
_CELL = 0.24
_LEAST, _MOST = 1.0, 13.0  # of the matrix, a side
_STRIP, _GAP = 0.2, 0.08
_EDGE, _LINE = 0.12, 0.22  # margin of the figure; a line of text
_BAR, _BAR_LENGTH = 0.14, 2.4
_BAR_ROOM = 0.95  # of a colour bar with its figures and its name

# Points, and characters.
_FONT, _SMALLEST_FONT = 8.5, 4.0
_LABEL = 18
_DPI = 200

_COLOURS = "RdBu_r"
_NO_COSINE = "#b8bcc2"
_IDENTICAL, _DIFFERING = "#6b7580", "#000000"
_HELP = (
    "Red: the two tokens rise and fall together; blue: one rises where the other falls. Outlined: the same token in "
    "both responses (grey labels). Black labels: tokens that tell the responses apart. The strips show each token's "
    "entanglement with the whole other response."
)


@dataclass(frozen=True, kw_only=True)
class TokenPicture:
    """Token cosines as `token_cosines` describes them, by token texts, with each token's entanglement."""

    heat: HeatMap
    chosen_entanglement: Floats  # `⟨∇log π(y_w^a), g_l⟩`, float64 `[T_w]`
    rejected_entanglement: Floats  # `⟨∇log π(y_l^b), g_w⟩`, float64 `[T_l]`

    def __post_init__(self) -> None:
        strips = self.chosen_entanglement, self.rejected_entanglement
        for side, texts, strip in zip(("chosen", "rejected"), (self.heat.rows, self.heat.columns), strips, strict=True):
            count = len(strip)
            if len(texts) != count:
                raise InputError(
                    f"{side}_tokens holds {len(texts)} texts, and the {side} response has {count} tokens; give one "
                    "text a token, the prompt's left out."
                )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where everything goes, in inches from the left and the bottom, and how large the labels are, in points."""

    width: float
    height: float
    left: float
    bottom: float
    across: float
    up: float
    font: float
    steps: tuple[int, int]
    heading: list[str]
    foot: list[str]

    def box(self, left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
        """As shares of the figure, which is what `Figure.add_axes` takes."""
        return left / self.width, bottom / self.height, width / self.width, height / self.height


def draw_tokens(picture: TokenPicture) -> Figure:
    """Draw the matrix, chosen tokens downwards, rejected tokens to the right, with strips of entanglement."""
    figure, heat = new_figure(_DPI), picture.heat
    fonts, letters = _fonts()
    labels = [
        [f"{place} {visible(_escape(text, letters), _LABEL)}" for place, text in enumerate(map(str, texts))]
        for texts in (heat.rows, heat.columns)
    ]
    plan = _plan(heat, labels, letters)
    figure.set_size_inches(plan.width, plan.height)
    text = {"fontfamily": fonts, "parse_math": False, "usetex": False, "color": "black"}
    _write_lines(figure, plan, text)
    axes = figure.add_axes(plan.box(plan.left, plan.bottom, plan.across, plan.up), label=heat.name)
    cosines = _paint(axes, np.array(heat.values, dtype=np.float64), heat.limit)
    _outline(axes, heat.marked, min(plan.across / len(heat.columns), plan.up / len(heat.rows)))
    strips = _draw_strips(figure, plan, picture, labels, text)
    _draw_bars(figure, plan, (cosines, strips), text)
    return figure


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise InputError(
            f"{path}: the picture is written as PNG, so its name must end in .png. For another format, use savefig of "
            "the figure that is returned."
        )
    content = io.BytesIO()
    figure.savefig(content, format="png")
    try:
        target.write_bytes(content.getvalue())
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}). Choose another place.") from error
    return target


def _plan(heat: HeatMap, labels: Sequence[Sequence[str]], letters: frozenset[int]) -> _Plan:
    rows, columns = len(heat.rows), len(heat.columns)
    cell = min(_CELL, _MOST / max(rows, columns))
    up, across = max(_LEAST, rows * cell), max(_LEAST, columns * cell)
    font = min(_FONT, max(_SMALLEST_FONT, 0.72 * cell * 72))
    steps = tuple(max(1, math.ceil(1.08 * font / 72 * count / side)) for count, side in ((rows, up), (columns, across)))
    beside, below = (max(map(len, side)) * 0.6 * font / 72 + 0.06 for side in labels)
    left = _EDGE + _LINE + beside + _STRIP + _GAP
    width = left + across + 2 * _BAR_ROOM + _EDGE
    heading = _wrap(_escape(heat.title, letters), width, 12, 3)
    has_gaps = not np.isfinite(np.array(heat.values, dtype=np.float64)).all()
    foot = _wrap(_HELP + (" Grey: a token without gradient has no cosine." if has_gaps else ""), width, 8, 8)
    bottom = _EDGE + len(foot) * 0.16 + 0.1 + _LINE + below + _STRIP + _GAP
    height = max(bottom + up, _EDGE + len(foot) * 0.16 + 0.3 + _BAR_LENGTH) + _EDGE + 0.08 + len(heading) * _LINE
    bottom = height - up - _EDGE - 0.08 - len(heading) * _LINE
    return _Plan(
        width=width, height=height, left=left, bottom=bottom, across=across, up=up, font=font,
        steps=(steps[0], steps[1]), heading=heading, foot=foot,
    )  # fmt: skip


def _wrap(text: str, width: float, size: float, most: int) -> list[str]:
    """Lines that fit the figure's width at a font size, by what letters measure on average."""
    letters = int((width - 2 * _EDGE) * 72 / (0.54 * size))
    return textwrap.wrap(text, letters, max_lines=most, placeholder=" …") if text else []


def _write_lines(figure: Figure, plan: _Plan, text: dict[str, Any]) -> None:
    left = _EDGE / plan.width
    for number, line in enumerate(plan.heading):
        place = (plan.height - _EDGE - number * _LINE) / plan.height
        figure.text(left, place, line, fontsize=11, fontweight="bold", va="top", **text)
    for number, line in enumerate(reversed(plan.foot)):
        figure.text(left, (_EDGE + number * 0.16) / plan.height, line, fontsize=8, va="bottom", **text)


def _paint(axes: Axes, values: Floats, limit: float) -> AxesImage:
    from matplotlib import colormaps  # noqa: PLC0415

    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colormaps[_COLOURS].with_extremes(bad=_NO_COSINE), vmin=-limit, vmax=limit,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color=_IDENTICAL)
    return image


def _outline(axes: Axes, alignment: Sequence[tuple[int, int]], cell: float) -> None:
    """A thin dark line on a light one: seen on every colour."""
    from matplotlib.collections import PolyCollection  # noqa: PLC0415

    squares = [[(b - 0.5, a - 0.5), (b + 0.5, a - 0.5), (b + 0.5, a + 0.5), (b - 0.5, a + 0.5)] for a, b in alignment]
    if not squares:
        return
    line = min(1.0, 72 * cell * 0.09)
    for color, width in (("white", 2.2 * line), ("black", line)):
        outlines = PolyCollection(squares, facecolors="none", edgecolors=color, linewidths=width)
        axes.add_collection(outlines, autolim=False)


def _draw_strips(
    figure: Figure, plan: _Plan, picture: TokenPicture, labels: Sequence[Sequence[str]], text: dict[str, Any]
) -> AxesImage:
    """The two strips on one scale, with the tokens' names on their outer sides."""
    strengths = picture.chosen_entanglement, picture.rejected_entanglement
    largest = max((float(np.abs(side[np.isfinite(side)]).max(initial=0.0)) for side in strengths), default=0.0)
    beside = plan.box(plan.left - _GAP - _STRIP, plan.bottom, _STRIP, plan.up)
    boxes = beside, plan.box(plan.left, plan.bottom - _GAP - _STRIP, plan.across, _STRIP)
    shared = {a for a, _ in picture.heat.marked}, {b for _, b in picture.heat.marked}
    for side, name in enumerate(("chosen", "rejected")):
        axes = figure.add_axes(boxes[side], label=name)
        column = strengths[side][:, None]
        image = _paint(axes, column if side == 0 else column.T, largest or 1.0)
        axis = axes.yaxis if side == 0 else axes.xaxis
        places = list(range(0, len(column), plan.steps[side]))
        axis.set_ticks(places, [labels[side][place] for place in places], fontsize=plan.font, **text)
        axis.set_tick_params(length=0, pad=2, labelrotation=0 if side == 0 else 90)
        for place, tick in zip(places, axis.get_ticklabels(), strict=True):
            tick.set_color(_IDENTICAL if place in shared[side] else _DIFFERING)
    across, up = (plan.left + plan.across / 2) / plan.width, (plan.bottom + plan.up / 2) / plan.height
    below = (_EDGE + len(plan.foot) * 0.16 + 0.1) / plan.height
    figure.text((_EDGE + 0.06) / plan.width, up, "chosen", rotation=90, fontsize=9, va="center", **text)
    figure.text(across, below, "rejected", fontsize=9, ha="center", va="bottom", **text)
    return image


def _draw_bars(figure: Figure, plan: _Plan, images: tuple[AxesImage, AxesImage], text: dict[str, Any]) -> None:
    bottom = plan.bottom + plan.up - _BAR_LENGTH
    names = "cosine of two tokens' gradients", "entanglement of a token"
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        left = plan.left + plan.across + 0.2 + number * _BAR_ROOM
        axes = figure.add_axes(plan.box(left, bottom, _BAR, _BAR_LENGTH), label=f"scale {number}")
        bar = figure.colorbar(image, cax=axes)
        places = np.linspace(*image.get_clim(), 5)
        figures = [f"{place:{',.0f' if 1e3 <= abs(place) < 1e6 else '.3g'}}" for place in places]
        bar.set_ticks(places.tolist(), labels=figures, fontsize=7, **text)
        bar.ax.tick_params(length=2)
        bar.set_label(name, fontsize=8, **text)
        bar.outline.set_linewidth(0.5)


def _escape(text: str, letters: frozenset[int]) -> str:
    return escape_missing(visible(text) if not text.isprintable() else text, letters)


def _fonts() -> tuple[list[str], frozenset[int]]:
    """The families to draw with, the user's own first, and all characters that they have."""
    from matplotlib import font_manager, rcParams  # noqa: PLC0415

    settings: Any = rcParams
    files = {font.name: font.fname for font in reversed(font_manager.fontManager.ttflist)}
    wanted = [name for family in settings["font.family"] for name in settings.get(f"font.{family}", [family])]
    families = [name for name in (*wanted, "DejaVu Sans") if name in files]
    return list(dict.fromkeys(families)), letters_of(*(files[name] for name in families))
