"""`gradent doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from gradent.cli.console import readable_errors

__all__ = ["doctor"]


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False) -> None:
    """Check this installation: versions, devices, how gradients are reduced, and two models against plain autograd."""
    with readable_errors():
        from gradent.doctor import examine, print_report  # noqa: PLC0415

        report = examine()
        print_report(report, Console(highlight=False), as_json=as_json)
    raise typer.Exit(0 if report["passed"] else 1)
