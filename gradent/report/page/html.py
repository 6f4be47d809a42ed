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
from gradent.figures.charts import Bars, Figure, HeatMap
from gradent.figures.plotly import plotly_json
from gradent.report.page.alt_text import describe_figure, tabulate_figure
from gradent.report.page.parts import Cell, Fold, Notice, Numbers, Part, Quote, Table, Word, Words
from gradent.text import printable, visible

__all__ = ["Page", "Section", "render_page", "write_page"]

_FILES = ("html.j2", "css", "js")
_CONTENTS = 5  # sections from which on a page lists them; folded ones are their own list
_BAR, _BARS_ROOM = 2.1, 9.0  # heights in rem: of a lying bar, and of what stands around all bars


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and parts in order; `serves` says what a reader can decide by it."""

    # `folded`: only the heading is seen until it is asked for.

    title: str
    text: str
    parts: Sequence[Part]
    serves: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str  # of the page
    lead: str  # what was done, in a sentence or two
    facts: Sequence[tuple[str, str]] = ()  # name and value of what a reader must know of the run
    sections: Sequence[Section] = field(default_factory=tuple)  # in order
    foot: str = ""  # a closing line
    notices: Sequence[Notice] = ()  # what must be seen before anything else


def render_page(page: Page) -> str:
    """The page as HTML."""
    try:
        import jinja2  # noqa: PLC0415
        from plotly.offline import get_plotlyjs  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"Reports need jinja2 and plotly, and {error.name} is not installed. Install the extra: "
            'pip install "gradent[audit]".'
        ) from error
    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, undefined=strict, trim_blocks=True, finalize=_shown)
    sections: list[dict[str, Any]] = [
        {**vars(section), "parts": [_to_part(part) for part in section.parts]} for section in page.sections
    ]
    listed = len(sections) >= _CONTENTS and not any(section.folded for section in page.sections)
    kinds = {part["kind"] for section in sections for part in section["parts"]}
    template, css, script = ((Path(__file__).parent / f"page.{end}").read_text("utf-8") for end in _FILES)
    return environment.from_string(template).render(
        page=page, sections=sections, contents=listed, css=css,
        plotlyjs=get_plotlyjs() if "figure" in kinds else "", script=script if {"figure", "words"} & kinds else "",
    )  # fmt: skip


def write_page(path: str | os.PathLike[str], page: Page) -> Path:
    """Write the page."""
    target, text = Path(path), render_page(page)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}). Choose another --out directory.") from error
    return target


def _to_part(part: Part) -> dict[str, Any]:
    """What the template reads: the part's kind and its contents."""
    if isinstance(part, Figure):
        return _to_figure(part)
    if isinstance(part, Quote):
        return {"kind": "quote", "title": part.title, "text": part.text}
    if isinstance(part, Words):
        return _to_words(part)
    if isinstance(part, Numbers):
        return {"kind": "numbers", "numbers": part.numbers}
    if isinstance(part, Notice):
        return {"kind": "notice", "notice": part}
    if isinstance(part, Fold):
        return {"kind": "fold", "title": part.title, "parts": [_to_part(inner) for inner in part.parts]}
    return _to_table(part)


def _to_figure(figure: Figure) -> dict[str, Any]:
    """A figure as JSON, with its title, what it shows in words, and its numbers as a table (None where too many)."""
    table = tabulate_figure(figure)
    size: dict[str, Any] = {"height": ""}
    if isinstance(figure, HeatMap):
        size = {"rows": len(figure.rows), "columns": len(figure.columns)}
    elif isinstance(figure, Bars) and not figure.upright:
        size["height"] = f"{_BARS_ROOM + _BAR * len(figure.names):.1f}rem"
    content = json.dumps(plotly_json(figure), ensure_ascii=True, allow_nan=False)
    for letter in "&<>":  # safe inside a script element
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    return {
        "kind": "figure", "figure": content, "title": figure.title, "label": describe_figure(figure),
        "table": None if table is None else _to_table(table), **size,
    }  # fmt: skip


def _to_table(table: Table) -> dict[str, Any]:
    first = len(table.header) if table.figures_from is None else table.figures_from
    has_names = table.figures_from is not None
    rows = [
        [_to_cell(cell, column >= first, column == 0 and has_names) for column, cell in enumerate(row)]
        for row in table.rows
    ]
    header = [(name, "num" if column >= first else "") for column, name in enumerate(table.header)]
    label = table.caption or table.folded or ", ".join(name for name in table.header if name)
    return {
        "kind": "table", "header": header, "rows": rows, "folded": table.folded, "caption": table.caption,
        "label": label, "measured": has_names,
    }  # fmt: skip


def _to_cell(cell: Cell | str, figure: bool, names: bool) -> dict[str, Any]:
    cell = Cell((cell,)) if isinstance(cell, str) else cell
    return {"lines": cell.lines, "classes": " ".join([cell.mood, "num" if figure else ""]).strip(), "names": names}


def _shown(value: Any) -> Any:
    """What the template is about to print: a text that changes its reading direction would change its neighbours'."""
    return printable(value) if type(value) is str else value


def _to_words(words: Words) -> dict[str, Any]:
    sizes = [abs(word.value) for _, pieces in words.texts for word in pieces if math.isfinite(word.value)]
    limit = max(sizes, default=0.0)

    def depth(value: float) -> str:
        return f"{math.sqrt(abs(value) / limit):.2f}" if limit and math.isfinite(value) else "0"

    def mood(value: float) -> str:
        if not (math.isfinite(value) and value):
            return ""
        return ("above" if value > 0 else "below") + (" red" if (value > 0) == words.bad_above else " blue")

    def piece(word: Word) -> dict[str, Any]:
        text = (word.text or visible("")).replace("\n", "⏎\n")  # a line end is seen and ends the line
        return {"word": word, "text": text, "depth": depth(word.value), "mood": mood(word.value)}

    texts = [(title, [piece(word) for word in pieces]) for title, pieces in words.texts]
    ends = [(words.below, mood(-1.0)), (words.above, mood(1.0))] if limit else []
    return {"kind": "words", "texts": texts, "ends": ends}
