"""What a section of a report may hold beside figures: tables, texts, coloured text, large numbers, notices, folds.

Text is plain text here: the page escapes it. Figures are in `figure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradent.report.page.charts import Bars, Chart, HeatMap

__all__ = ["BigNumber", "Cell", "Fold", "Notice", "Numbers", "Part", "Quote", "Table", "Word", "Words"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: lines of text, and a mood (`good`, `bad` or none) that colours it."""

    lines: tuple[str, ...]
    mood: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells or plain strings under a header.

    Attributes:
        header: a name each column.
        rows: as many cells a row.
        folded: where not empty, the table is hidden behind this text until asked for.
        caption: what the table shows; read out before it, and shown where it stands.
        figures_from: the column from which on cells are figures, set to the right; None for none. The first cell of a
            row of such a table names the row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    folded: str = ""
    caption: str = ""
    figures_from: int | None = None


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


@dataclass(frozen=True)
class BigNumber:
    """A figure that a reader is to see first: what it is, its value, and what there is to say of it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Numbers:
    """Large figures side by side."""

    numbers: Sequence[BigNumber]


@dataclass(frozen=True)
class Notice:
    """Something that must not be overlooked: a title and sentences; `warns` where it limits what the page can say."""

    title: str
    text: str
    warns: bool = False


@dataclass(frozen=True)
class Fold:
    """Tables and texts hidden behind a line until asked for. No figures: a hidden one has no width to be drawn in."""

    title: str
    parts: Sequence[Table | Quote]


Part = Table | Chart | HeatMap | Bars | Quote | Words | Numbers | Notice | Fold
