"""What a scan prints: how well each stand-in ranks the pairs, and what it costs."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from gradent.record.scans import ScanRecord
from gradent.report.page.numbers import fixed, number, plural
from gradent.report.terminal.tables import new_table
from gradent.text import printable

__all__ = ["print_scan"]


def print_scan(record: ScanRecord, console: Console) -> None:
    """Print the grades of a scan."""
    data, exact = record["data"], record["exact"]
    pairs = exact["pairs"] if exact else 0
    title = (
        f"\n{plural(data['scanned'], 'pair')} of {printable(str(data['source']))}, {pairs:,} of them measured exactly\n"
    )
    console.print(Text(title, "bold"), soft_wrap=True)
    if not record["grades"]:
        console.print(Text("Too few pairs were measured exactly to grade the stand-ins (--exact)."), soft_wrap=True)
        return
    rows = [
        [
            row["rung"],
            *(fixed(row[goal]["spearman"]) for goal in ("cosine", "pair_change", "sample_change")),
            number(row["cost"]),
        ]
        for row in record["grades"]
    ]
    names = ("exact\ncosine", "step on\nthe pair", "step on\nthe sample", "seconds\na pair")
    console.print(new_table("stand-in", *names, text=1, rows=rows))
    foot = "\nSpearman's ρ with each exact value, turned so that more is worse; intervals are on the page."
    console.print(Text(foot), soft_wrap=True)
