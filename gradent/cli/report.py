"""`gradent report` and `gradent compare`: pages from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradent.cli.console import readable_errors, say

__all__ = ["compare", "report"]


def report(
    directory: Annotated[Path, typer.Argument(help="What `gradent audit`, `tokens`, `demo` or the callback wrote.")],
) -> None:
    """Make the pages and figures of a directory anew from its records; no model is needed."""
    with readable_errors(loads_models=False):
        from gradent.report import write_report  # noqa: PLC0415

        say(f"Wrote {', '.join(map(str, write_report(directory)))}.")


def compare(
    first: Annotated[Path, typer.Argument(help="Directory of one audit.")],
    second: Annotated[Path, typer.Argument(help="Directory of another.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
) -> None:
    """Put two audits side by side: the same pairs, two runs, two losses or two models."""
    with readable_errors(loads_models=False):
        from gradent.report import print_comparison, write_comparison  # noqa: PLC0415

        page = write_comparison(first, second, out)
        print_comparison(first, second, Console(highlight=False))
        say(f"\nWrote {page}.")
