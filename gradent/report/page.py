"""What every report is made of: facts, tables, figures and coloured text, and one template that makes a page of them.

The page is one file that loads nothing: plotly.js, data and style are inside, and its content security policy forbids
the rest. All text goes through jinja2's escaping, and control characters are written out; figures are JSON without
`<`, `>` and `&`.
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
from gradent.report.figure import Chart, HeatMap, Line, chart_figure, heat_figure
from gradent.token_text import readable

__all__ = [
    "Cell",
    "Chart",
    "HeatMap",
    "Line",
    "Page",
    "Quote",
    "Section",
    "Table",
    "Word",
    "Words",
    "render_page",
    "write_page",
]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: lines of text, and a mood (`good`, `bad` or none) that colours it."""

    lines: tuple[str, ...]
    mood: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells or plain strings under a header; with a text in `folded`, hidden behind it until asked for."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    folded: str = ""


@dataclass(frozen=True)
class Quote:
    """A text as it stands, with its line ends, under a heading."""

    title: str
    text: str


@dataclass(frozen=True)
class Word:
    """A piece of coloured text.

    Attributes:
        text: as it reads.
        value: above 0, below 0, or nan for neither; it gives the colour.
        note: the value and whatever else there is to say, in words; shown when the piece is pointed at or stepped to.
        strong: whether it is set in bold.
    """

    text: str
    value: float
    note: str
    strong: bool = False


@dataclass(frozen=True)
class Words:
    """Texts whose pieces are coloured by their values, all on one scale.

    Depth goes with the square root of a value, so that small ones are seen beside large ones. Pieces below 0 are also
    underlined by dots, those above 0 by a line.

    Attributes:
        texts: a title and its pieces, each.
        below: what a value below 0 means, in a word or two.
        above: what a value above 0 means.
        bad_above: whether it is the values above 0 that are red.
    """

    texts: Sequence[tuple[str, Sequence[Word]]]
    below: str
    above: str
    bad_above: bool = False


Part = Table | Chart | HeatMap | Quote | Words


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and parts in order."""

    title: str
    text: str
    parts: Sequence[Part]


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
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_shown
    )
    template = environment.from_string((Path(__file__).parent / "page.html.j2").read_text("utf-8"))
    sections: list[dict[str, Any]] = [
        {
            "title": section.title,
            "text": section.text,
            "parts": [_to_part(part) for part in section.parts],
        }
        for section in page.sections
    ]
    kinds = {part["kind"] for section in sections for part in section["parts"]}
    plotlyjs = get_plotlyjs() if "figure" in kinds else ""
    return template.render(page=page, sections=sections, plotlyjs=plotlyjs, words="words" in kinds)


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


def _to_part(part: Part) -> dict[str, Any]:
    """What the template reads: the part's kind and its contents, a figure as JSON."""
    if isinstance(part, Chart):
        return {"kind": "figure", "figure": _json(chart_figure(part)), "label": f"{part.y_label} over {part.x_label}"}
    if isinstance(part, HeatMap):
        label = f"{part.name}: {part.y_label} by {part.x_label}"
        size = {"rows": len(part.rows), "columns": len(part.columns)}
        return {"kind": "figure", "figure": _json(heat_figure(part)), "label": label, **size}
    if isinstance(part, Quote):
        return {"kind": "quote", "title": part.title, "text": part.text}
    if isinstance(part, Words):
        return {"kind": "words", **_to_words(part)}
    rows = [[cell if isinstance(cell, Cell) else Cell((cell,)) for cell in row] for row in part.rows]
    return {"kind": "table", "header": part.header, "rows": rows, "folded": part.folded}


def _shown(value: Any) -> Any:
    """What the template is about to print: a text that changes its reading direction would change its neighbours'."""
    return readable(value) if type(value) is str else value


def _to_words(words: Words) -> dict[str, Any]:
    sizes = [abs(word.value) for _, pieces in words.texts for word in pieces if math.isfinite(word.value)]
    limit = max(sizes, default=0.0)

    def depth(value: float) -> str:
        return f"{math.sqrt(abs(value) / limit):.2f}" if limit and math.isfinite(value) else "0"

    def mood(value: float) -> str:
        if not (math.isfinite(value) and value):
            return ""
        return ("above" if value > 0 else "below") + (" red" if (value > 0) == words.bad_above else " blue")

    texts = [
        (title, [{"word": word, "depth": depth(word.value), "mood": mood(word.value)} for word in pieces])
        for title, pieces in words.texts
    ]
    return {"texts": texts, "ends": [(words.below, mood(-1.0)), (words.above, mood(1.0))] if limit else []}


def _json(figure: dict[str, Any]) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(figure, ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
