"""`gradent report` and `gradent compare`: pages from records alone."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gradent.cli.console import readable_errors, say
from gradent.cli.options import hyperparameters, parameter, takes
from gradent.errors import InputError

__all__ = ["compare", "report"]

_OTHER = "Another loss"


@takes([
    parameter("directory", Path, typer.Argument(
        help="What `gradent audit`, `scan`, `tokens`, `demo` or the callback wrote.",
    ), inspect.Parameter.empty),
    parameter("lr", float | None, typer.Option(
        show_default=False, help="Show what a step of plain gradient descent does in nats at this learning rate.",
    ), None),
    parameter("loss", str | None, typer.Option(
        rich_help_panel=_OTHER, show_default=False, help="Judge an audit under this loss; nothing is measured anew.",
    ), None),
    *hyperparameters(_OTHER),
    parameter("out", Path | None, typer.Option(
        rich_help_panel=_OTHER, show_default=False, help="Where the audit under that loss goes.",
    ), None),
])  # fmt: skip
def report(directory: Path, lr: float | None, loss: str | None, out: Path | None, **values: Any) -> None:
    """Make the pages and figures of a directory anew from its records; no model is needed.

    With --loss, an audit's record is judged under another loss and written to --out.
    """  # noqa: DOC501
    hyper = {name: value for name, value in values.items() if value is not None}
    with readable_errors(loads_models=False):
        if loss is None:
            if hyper or out is not None:
                raise InputError(
                    "--out and a loss's options belong to --loss: gradent report DIR --loss simpo --out OUT"
                )
            from gradent.report import write_report  # noqa: PLC0415

            say(f"Wrote {', '.join(map(str, write_report(directory, lr)))}.")
            return
        if lr is not None:
            raise InputError("--lr is for a step on the sample, which is left out under another loss. Leave one out.")
        if out is None:
            raise InputError(f"--loss {loss}: say with --out where the audit under that loss is to go.")
        from gradent.auditing.rejudge import rejudge  # noqa: PLC0415  (imports torch)

        rejudge(directory, loss, out, **hyper)
        say(f"Wrote {out / 'report.html'}, {out / 'pairs.parquet'} and {out / 'summary.json'}.")


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
