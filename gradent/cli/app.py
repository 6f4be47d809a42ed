"""The command line: `demo`, `audit`, `scan`, `select`, `report`, `watch`, `compare`, `tokens`, `plan`, `doctor`.

Each command imports what it needs when it runs, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from gradent.cli.audit import audit
from gradent.cli.demo import demo
from gradent.cli.doctor import doctor
from gradent.cli.plan import plan
from gradent.cli.report import compare, report
from gradent.cli.scan import scan
from gradent.cli.select import select
from gradent.cli.tokens import tokens
from gradent.cli.watch import watch
from gradent.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="gradent",
    help="Why do chosen and rejected log-probs move together? gradent measures the gradient entanglement behind it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
)  # fmt: skip
for command in (demo, audit, scan, select, report, watch, compare, tokens, plan, doctor):
    app.command()(command)


def main() -> None:
    """Run the command line; the entry point of `gradent` and of `python -m gradent`."""
    app(prog_name="gradent")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gradent {__version__}")
        raise typer.Exit


@app.callback()
def _gradent(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
