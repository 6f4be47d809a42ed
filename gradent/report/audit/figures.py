"""An audit's main curves as PNG and SVG files, for papers and slides: log-probs, cases, other losses.

They are drawn on canvases of their own: pyplot, its backend and its open figures are not touched. No date goes into the
files, so that the same records give the same files with the same matplotlib.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradent.figures.token_heatmap import new_figure
from gradent.record.atomic import make_directory, write_whole
from gradent.report.audit.losses import describe_row, shown_rows
from gradent.report.audit.records import AuditRecords, read_audit
from gradent.report.audit.steps import STEP, has_curve, logp_lines
from gradent.report.page.cases import CASE_COLOURS, CASES, share_of
from gradent.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_audit_figures"]

_COLOURS = {"chosen": "#1f6fb4", "rejected": "#c77400", **CASE_COLOURS}
_DARK = {"ideal", "reversed"}  # colours on which white is read
_WIDTH, _HEIGHT, _BAR, _DPI = 6.4, 3.6, 0.3, 200  # inches, and dots to one
_LABEL = 34  # characters of a loss's name
_LEAST_TEXT = 0.06  # share from which a piece of a bar holds its figure
_FONT = "DejaVu Sans"  # comes with matplotlib, so that files do not hang on a machine's fonts
_FORMATS: dict[str, dict[str, Any]] = {
    "png": {"metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None, "Creator": None}},
}


def write_audit_figures(directory: str | os.PathLike[str]) -> list[Path]:
    """Write the main curves of an audit into `figures/` beside its records."""
    records = read_audit(directory)
    place = make_directory(records.directory / "figures")
    written = []
    for name, draw in _FIGURES.items():
        figure = draw(records)
        for form, options in _FORMATS.items():
            path = place / f"{name}.{form}"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            content = _render(figure, form, options)
            write_whole(path, lambda handle, content=content: handle.write(content))  # type: ignore[misc]
            written.append(path)
    return written


def _render(figure: Figure, form: str, options: dict[str, Any]) -> bytes:
    from matplotlib import rc_context  # noqa: PLC0415

    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "gradent", "svg.fonttype": "path"}):  # names inside an SVG that do not change
        figure.savefig(content, format=form, **options)
    return content.getvalue()


def _new_figure(height: float) -> tuple[Figure, Axes]:
    figure = new_figure(_DPI, figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("white")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _draw_logps(records: AuditRecords) -> Figure | None:
    lines = logp_lines(records)
    if not has_curve(lines):
        return None
    figure, axes = _new_figure(_HEIGHT)
    for line in lines:
        style: dict[str, Any] = (
            {"linewidth": 0.9, "linestyle": ":"} if line.dashed else {"marker": "o", "markersize": 3}
        )
        axes.plot(line.x, line.y, color=_COLOURS[line.colour], label=line.name, **style)
        low, high = line.edges()
        if len(low):
            axes.fill_between(line.x, low, high, color=_COLOURS[line.colour], alpha=0.15, linewidth=0)
    onset = ((records.summary["dynamics"] or {}).get("onset") or {}).get("measured")
    if onset is not None:
        axes.axvline(float(onset), color="#5b6672", linewidth=0.8, linestyle="--", label="both fall (measured)")
    _label(axes, STEP, "mean log π(response), nats")
    _legend(figure, axes, 3)
    return figure


def _draw_cases(records: AuditRecords) -> Figure | None:
    if len(records.measured) < 2:
        return None
    figure, axes = _new_figure(_HEIGHT)
    shares = [[each.share(case) for each in records.measured] for case in CASES]
    axes.stackplot(records.steps, shares, labels=list(CASES.values()), colors=[_COLOURS[case] for case in CASES])
    axes.set_xlim(records.steps[0], records.steps[-1])
    axes.set_ylim(0, 1)
    _percent(axes.yaxis)
    _label(axes, STEP, "share of pairs")
    _legend(figure, axes, 3)
    return figure


def _draw_what_if(records: AuditRecords) -> Figure | None:
    rows = [row for row in shown_rows(records.summary["what_if"]) if row.get("cases")]
    if not rows:
        return None
    figure, axes = _new_figure(1.3 + _BAR * len(rows))
    places, left = list(range(len(rows))), [0.0] * len(rows)
    for case, label in CASES.items():
        values = [share_of(row["cases"], case) or 0.0 for row in rows]
        axes.barh(places, values, left=left, color=_COLOURS[case], label=label, height=0.7)
        for place, value in zip(places, values, strict=True):
            if value >= _LEAST_TEXT:
                colour = "white" if case in _DARK else "black"
                middle = left[place] + value / 2
                axes.text(middle, place, f"{value:.0%}", color=colour, fontsize=7, ha="center", va="center")
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(places, _names([describe_row(row) for row in rows]), parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    _percent(axes.xaxis)
    _label(axes, "share of pairs", "")
    _legend(figure, axes, 3)
    return figure


_FIGURES: dict[str, Callable[[AuditRecords], Any]] = {
    "logps": _draw_logps,
    "cases": _draw_cases,
    "what_if": _draw_what_if,
}


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, fontfamily=_FONT)
    axes.set_ylabel(y, fontsize=9, fontfamily=_FONT)
    for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        tick.set(fontsize=8, fontfamily=_FONT)
    axes.grid(visible=False)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        prop={"family": _FONT, "size": 8},
    )


def _names(labels: Sequence[str]) -> list[str]:
    """Labels that the font can draw: any other character by its number."""
    from matplotlib import font_manager  # noqa: PLC0415

    letters = font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
    shown = [visible(label, space=" ") for label in labels]
    drawn = ["".join(each if ord(each) in letters else f"\\u{ord(each):04x}" for each in label) for label in shown]
    return [label if len(label) <= _LABEL else label[: _LABEL - 1] + "…" for label in drawn]
