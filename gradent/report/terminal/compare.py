"""Two audits in the terminal: what differs in their settings, then figures and differences."""

from __future__ import annotations

import os

from rich.console import Console
from rich.text import Text

from gradent.report.compare.match import compare_audits, describe_finding
from gradent.report.compare.page import describe_difference
from gradent.report.page.numbers import count, number, percent
from gradent.report.terminal.tables import new_table
from gradent.text import visible

__all__ = ["print_comparison"]

_WIDTH = 60  # characters of a setting


def print_comparison(
    directory_a: str | os.PathLike[str], directory_b: str | os.PathLike[str], console: Console
) -> None:
    """Print two audits, A and B, side by side."""
    both = compare_audits(directory_a, directory_b)
    if both.settings:
        console.print(Text("What differs in the settings", "bold"))
        settings = ([Text(visible(cell, _WIDTH, space=" "), overflow="fold") for cell in row] for row in both.settings)
        console.print(new_table("", "A", "B", text=3, rows=settings))
    console.print(Text(f"\n{both.matching}", overflow="fold"))
    rows = []
    for row in both.rows:
        shown = percent if row.share else number
        rows.append([row.name, shown(row.first), shown(row.second), describe_difference(row), count(row.pairs)])
    console.print(new_table("", "A", "B", "B minus A", "same pairs", text=1, rows=rows))
    console.print(Text("± is one standard error of the difference."))
    console.print(Text(f"\n{describe_finding(both)}.", "bold", overflow="fold"))
