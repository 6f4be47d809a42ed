"""What a section of a report may hold beside figures: tables, texts, coloured text, large numbers, notices, folds.

Text is plain text here: the page escapes it. Figures are in `figure`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradent.figures.charts import Figure
from gradent.report.page.numbers import signed_number

__all__ = ["BigNumber", "Cell", "Fold", "Notice", "Numbers", "Part", "Quote", "Table", "Word", "Words", "scaled_words"]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: lines of text, and a mood (`good`, `bad` or none) that colours it."""

    lines: tuple[str, ...]
    mood: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells or plain strings under a header."""

    header: Sequence[str]  # a name each column
    rows: Sequence[Sequence[Cell | str]]  # as many cells a row
    folded: str = ""  # where not empty, the table is hidden behind this text until asked for
    caption: str = ""  # what the table shows; read out before it, and shown where it stands
    # the column from which on cells are figures, set to the right; None for none. The first cell of a row of
    # such a table names the row
    figures_from: int | None = None


@dataclass(frozen=True)
class Quote:
    """A text as it stands, with its line ends, under a heading."""

    title: str
    text: str


@dataclass(frozen=True)
class Word:
    """A piece of coloured text."""

    text: str  # as it reads
    value: float  # above 0, below 0, or nan for neither; it gives the colour
    note: str  # the value and whatever else there is to say, in words; shown when the piece is pointed at or stepped to
    strong: bool = False  # whether it is set in bold


@dataclass(frozen=True)
class Words:
    """Texts whose pieces are coloured by their values, all on one scale."""

    texts: Sequence[tuple[str, Sequence[Word]]]  # a title and its pieces, each
    below: str  # what a value below 0 means, in a word or two
    above: str  # what a value above 0 means
    bad_above: bool = False  # whether it is the values above 0 that are red


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


Part = Table | Figure | Quote | Words | Numbers | Notice | Fold


def scaled_words(
    texts: Sequence[tuple[str, Sequence[Word]]], below: str, above: str, *, bad_above: bool = False
) -> Words:
    """Coloured texts whose key says how far the values go."""
    values = [abs(word.value) for _, words in texts for word in words if math.isfinite(word.value)]
    largest = max(values, default=0.0)
    ends = f"{below}, down to {signed_number(-largest)}", f"{above}, up to {signed_number(largest)}"
    return Words(texts, *ends, bad_above)
