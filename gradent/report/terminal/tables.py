"""The one shape that tables have in a terminal: no lines, dim names, and no text read as rich markup."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.table import Column, Table
from rich.text import Text

__all__ = ["new_table"]


def new_table(
    *columns: str | Column, text: int | Collection[int] = 0, rows: Iterable[Sequence[str | Text]] = ()
) -> Table:
    """A table of figures, set to the right, and of text that may wrap: in its first columns, or those of `text`."""
    texts = range(text) if isinstance(text, int) else text
    named = [
        Column(Text(name), justify="left" if place in texts else "right", no_wrap=place not in texts)
        if isinstance(name, str) else name
        for place, name in enumerate(columns)
    ]  # fmt: skip
    table = Table(*named, box=None, padding=(0, 1), caption_justify="left", header_style="dim")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table
