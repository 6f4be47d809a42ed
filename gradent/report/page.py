"""What every report is made of: facts, tables and line charts, and one template that makes a page of them.

The page is one file that loads nothing: plotly.js, data and style are inside, and its content security policy forbids
the rest. All text goes through jinja2's escaping; figures are JSON without `<`, `>` and `&`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradent.errors import InputError

__all__ = ["Cell", "Chart", "Line", "Page", "Section", "Table", "render_page", "write_page"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: lines of text, and a mood (`good`, `bad` or none) that colours it."""

    lines: tuple[str, ...]
    mood: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells or plain strings under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]


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
class Section:
    """A heading, a sentence or two, and tables or charts in order."""

    title: str
    text: str
    parts: Sequence[Table | Chart]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: of the page.
        lead: what was done, in a sentence or two.
        facts: name and value of what a reader must know of the run.
        sections: in order.
        foot: a closing line.
    """

    title: str
    lead: str
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = field(default_factory=tuple)
    foot: str = ""


def render_page(page: Page) -> str:
    """The page as HTML.

    Args:
        page: the report.

    Returns:
        One self-contained document, about 5 MB because plotly.js is in it.

    Raises:
        InputError: jinja2 or plotly is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415
        from plotly.offline import get_plotlyjs  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"Reports need jinja2 and plotly, and {error.name} is not installed. Install the extra: "
            'pip install "gradent[audit]".'
        ) from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "page.html.j2").read_text("utf-8"))
    sections: list[dict[str, Any]] = [
        {
            "title": section.title,
            "text": section.text,
            "parts": [_to_part(part) for part in section.parts],
        }
        for section in page.sections
    ]
    charts = any(part["figure"] for section in sections for part in section["parts"])
    return template.render(page=page, sections=sections, plotlyjs=get_plotlyjs() if charts else "")


def write_page(path: str | os.PathLike[str], page: Page) -> Path:
    """Write the page.

    Args:
        path: the file; its directory must be there.
        page: the report.

    Returns:
        The file.

    Raises:
        InputError: the file cannot be written.
    """
    target, text = Path(path), render_page(page)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}). Choose another --out directory.") from error
    return target


def _to_part(part: Table | Chart) -> dict[str, Any]:
    """A table with every cell a `Cell`, or a chart's figure as JSON that is safe inside a script element."""
    if isinstance(part, Chart):
        text = json.dumps(_to_figure(part), ensure_ascii=True, allow_nan=False)
        safe = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
        return {"figure": safe, "label": f"{part.y_label} over {part.x_label}", "header": (), "rows": ()}
    rows = [[cell if isinstance(cell, Cell) else Cell((cell,)) for cell in row] for row in part.rows]
    return {"figure": "", "label": "", "header": part.header, "rows": rows}


def _to_figure(chart: Chart) -> dict[str, Any]:
    """Traces and layout for plotly.js; colours of text and grid are set in the page, which knows light from dark."""
    traces: list[dict[str, Any]] = []
    for number, line in enumerate(chart.lines):
        x = list(map(float, line.x))
        if len(line.band):
            upper = [y + half for y, half in zip(line.y, line.band, strict=True)]
            lower = [y - half for y, half in zip(line.y, line.band, strict=True)]
            band = {"x": x + x[::-1], "y": _gaps(upper + lower[::-1]), "fill": "toself", "hoverinfo": "skip"}
            traces.append({**band, "line": {"width": 0}, "mode": "lines", "showlegend": False, "meta": number})
        name = _plain(line.name)
        shown = "%{y:.3f}<extra>" + name + "</extra>"
        traces.append(
            {"x": x, "y": _gaps(line.y), "name": name, "mode": "lines+markers", "hovertemplate": shown, "meta": number}
        )
    y_axis = {"title": {"text": _plain(chart.y_label), "standoff": 12}, "zeroline": chart.zero, "automargin": True}
    layout = {"xaxis": {"title": {"text": _plain(chart.x_label)}, "zeroline": False}, "yaxis": y_axis}
    return {"data": traces, "layout": layout}


def _plain(text: str) -> str:
    """plotly reads some tags and entities in its labels: with these letters replaced there is none to read."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _gaps(values: Sequence[float]) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]
