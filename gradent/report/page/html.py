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
from gradent.report.page.alt_text import describe_figure, tabulate_figure
from gradent.report.page.charts import Bars, Chart, HeatMap, Line, Series
from gradent.report.page.parts import BigNumber, Cell, Fold, Notice, Numbers, Part, Quote, Table, Word, Words
from gradent.report.page.plotly import bars_figure, chart_figure, heat_figure
from gradent.text import printable

__all__ = [
    "Bars",
    "BigNumber",
    "Cell",
    "Chart",
    "Fold",
    "HeatMap",
    "Line",
    "Notice",
    "Numbers",
    "Page",
    "Part",
    "Quote",
    "Section",
    "Series",
    "Table",
    "Word",
    "Words",
    "render_page",
    "write_page",
]

_CONTENTS = 5  # sections from which on a page lists them
_BAR, _BARS_ROOM = 2.1, 9.0  # heights in rem: of a lying bar, and of what stands around all bars


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and parts in order; `serves` says what a reader can decide by it."""

    title: str
    text: str
    parts: Sequence[Part]
    serves: str = ""


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
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_shown
    )
    template = environment.from_string((Path(__file__).parent / "page.html.j2").read_text("utf-8"))
    sections: list[dict[str, Any]] = [
        {
            "title": section.title,
            "text": section.text,
            "serves": section.serves,
            "parts": [_to_part(part) for part in section.parts],
        }
        for section in page.sections
    ]
    kinds = {part["kind"] for section in sections for part in section["parts"]}
    return template.render(
        page=page,
        sections=sections,
        contents=len(sections) >= _CONTENTS,
        plotlyjs=get_plotlyjs() if "figure" in kinds else "",
        words="words" in kinds,
    )


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
    if isinstance(part, Chart | HeatMap | Bars):
        return _to_figure(part)
    if isinstance(part, Quote):
        return {"kind": "quote", "title": part.title, "text": part.text}
    if isinstance(part, Words):
        return {"kind": "words", **_to_words(part)}
    if isinstance(part, Numbers):
        return {"kind": "numbers", "numbers": part.numbers}
    if isinstance(part, Notice):
        return {"kind": "notice", "notice": part}
    if isinstance(part, Fold):
        return {"kind": "fold", "title": part.title, "parts": [_to_part(each) for each in part.parts]}
    return _to_table(part)


def _to_figure(part: Chart | HeatMap | Bars) -> dict[str, Any]:
    """A figure as JSON, with its title, what it shows in words, and its numbers as a table (None where too many)."""
    table = tabulate_figure(part)
    size: dict[str, Any] = {"height": ""}
    if isinstance(part, HeatMap):
        size, figure = {"rows": len(part.rows), "columns": len(part.columns)}, heat_figure(part)
    elif isinstance(part, Bars):
        figure = bars_figure(part)
        size["height"] = "" if part.upright else f"{_BARS_ROOM + _BAR * len(part.names):.1f}rem"
    else:
        figure = chart_figure(part)
    return {
        "kind": "figure",
        "figure": _json(figure),
        "title": part.title,
        "label": describe_figure(part),
        "table": None if table is None else _to_table(table),
        **size,
    }


def _to_table(table: Table) -> dict[str, Any]:
    first = len(table.header) if table.figures_from is None else table.figures_from
    rows = [
        [_to_cell(cell, column >= first, column == 0 and table.figures_from is not None) for column, cell in each]
        for each in (enumerate(row) for row in table.rows)
    ]
    header = [(name, "num" if column >= first else "") for column, name in enumerate(table.header)]
    label = table.caption or table.folded or ", ".join(name for name in table.header if name)
    return {
        "kind": "table",
        "header": header,
        "rows": rows,
        "folded": table.folded,
        "caption": table.caption,
        "label": label,
        "measured": table.figures_from is not None,
    }


def _to_cell(cell: Cell | str, figure: bool, names: bool) -> dict[str, Any]:
    whole = cell if isinstance(cell, Cell) else Cell((cell,))
    classes = " ".join(each for each in (whole.mood, "num" if figure else "") if each)
    return {"lines": whole.lines, "classes": classes, "names": names}


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

    texts = [
        (title, [{"word": word, "depth": depth(word.value), "mood": mood(word.value)} for word in pieces])
        for title, pieces in words.texts
    ]
    return {"texts": texts, "ends": [(words.below, mood(-1.0)), (words.above, mood(1.0))] if limit else []}


def _json(figure: dict[str, Any]) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(figure, ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
