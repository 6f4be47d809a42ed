"""`gradent demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradent.cli.console import readable_errors

__all__ = ["demo"]


def demo(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a causal LM. [default: a small one made on the spot]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the report and the records.")] = Path("gradent-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the data and the training.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="DPO steps. [default: the demo's own]")] = None,
) -> None:
    """See the effect: train a small model by DPO on four styles of response, and watch which log-probs fall."""
    with readable_errors():
        from gradent.demo import run_demo  # noqa: PLC0415

        code = run_demo(out=out, model=model, steps=steps, seed=seed)
    raise typer.Exit(code)
