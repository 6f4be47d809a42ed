"""`gradent watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradent.cli.console import readable_errors, say

__all__ = ["watch"]


def watch(
    directory: Annotated[Path, typer.Argument(help="What `EntanglementCallback(out=...)` writes into.")],
    port: Annotated[int, typer.Option(help="Port of 127.0.0.1; 0 for any that is free.")] = 8765,
) -> None:
    """Show a run while it goes on: a page on this machine, at 127.0.0.1, that follows the callback's records."""
    with readable_errors(loads_models=False):
        from gradent.report.run.watch import watch_run  # noqa: PLC0415

        watch_run(directory, port=port, say=say)
