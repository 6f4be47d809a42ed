"""Two audits in the terminal: what differs in their settings, then figures and differences. Text, never rich markup."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradent.report.compare.match import compare_audits
from gradent.report.compare.page import describe_difference
from gradent.report.page.numbers import NOTHING, number, percent
from gradent.text import visible

__all__ = ["print_comparison"]

_WIDTH = 60  # characters of a setting


def print_comparison(
    directory_a: str | os.PathLike[str], directory_b: str | os.PathLike[str], console: Console
) -> None:
    """Print two audits side by side."""
    both = compare_audits(directory_a, directory_b)
    if both.settings:
        console.print(Text("What differs in the settings", "bold"))
        table = _new_table("", "A", "B", text=3)
        for each in both.settings:
            table.add_row(*(Text(visible(value, _WIDTH, space=" "), overflow="fold") for value in each))
        console.print(table)
    console.print(Text(f"\n{both.matching}", overflow="fold"))
    table = _new_table("", "A", "B", "B minus A", "same pairs", text=1)
    for row in both.rows:
        shown = percent if row.share else number
        pairs = NOTHING if row.pairs is None else f"{row.pairs:,}"
        cells = (row.name, shown(row.first), shown(row.second), describe_difference(row), pairs)
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(Text("± is one standard error of the difference."))


def _new_table(*names: str, text: int) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for place, name in enumerate(names):
        table.add_column(Text(name), justify="left" if place < text else "right", no_wrap=place >= text)
    return table
