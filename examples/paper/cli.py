"""The commands: one a figure, table and theorem, and `all`, which writes reproduction.md."""

from __future__ import annotations

import os

os.environ.setdefault("WANDB_MODE", "offline")

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.paper import cases, comparisons, formulas, styles, theorems
from examples.paper.lab import Lab, Outcome
from examples.paper.page import write_page
from examples.paper.settings import PAPER, SMALL, Settings, on_model, shown_name
from gradent.errors import GradentError, InputError

__all__ = ["COMMANDS", "app", "choose_settings"]

COMMANDS: dict[str, Callable[[Lab], Outcome]] = {
    "figure1": comparisons.figure1,
    "figure2": comparisons.figure2,
    "figure3": styles.figure3,
    "figure4a": styles.figure4a,
    "figure4b": styles.figure4b,
    "figure5": comparisons.figure5,
    "figure6": comparisons.figure6,
    "table1": cases.table1,
    "table2": formulas.table2,
    "theorem1": theorems.theorem1,
    "corollary2": theorems.corollary2,
    "theorem3": theorems.theorem3,
}
"""Command to what it does, in the paper's order."""

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


def choose_settings(small: bool, steps: int | None, seeds: int | None, model: str | None = None) -> Settings:
    """What is run.

    Args:
        small: the stand-ins.
        steps: optimizer steps of every run, in the place of the settings'; SFT's and the measuring shrink with them.
        seeds: how many seeds.
        model: hub id or directory, in the place of the settings' models.

    Returns:
        The settings.

    Raises:
        InputError: fewer than 1 step or seed.
    """
    settings = SMALL if small else PAPER
    if model is not None:
        settings = on_model(settings, model)
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; at least 1 is needed.")
    if steps is not None:
        every = min(settings.every, max(1, steps // 2))
        demo = replace(
            settings.demo, dpo_steps=steps, measure_every=every, sft_steps=min(settings.demo.sft_steps, 15 * steps)
        )
        settings = replace(settings, steps=steps, every=every, demo=demo)
    return settings if seeds is None else replace(settings, seeds=tuple(range(seeds)))


Small = Annotated[bool, typer.Option("--small", help="Minutes on a CPU: small models, generated data.")]
Out = Annotated[Path, typer.Option(help="Where img/, data/ and reproduction.md go.")]
Model = Annotated[str | None, typer.Option(help="Hub id or directory, in the place of the paper's models.")]
Pairs = Annotated[
    str | None, typer.Option("--pairs", "--data", help="JSONL or hub id, with prompt, chosen and rejected.")
]
Tweets = Annotated[
    str | None, typer.Option(help="JSONL with text and label (positive or negative), or hub id (text, label_text).")
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of every run.")]
Seeds = Annotated[int | None, typer.Option(help="How many seeds, from 0.")]


def _add(name: str, function: Callable[[Lab], Outcome]) -> None:
    def command(
        small: Small = False, out: Out = Path("paper-out"), model: Model = None, pairs: Pairs = None,
        tweets: Tweets = None, steps: Steps = None, seeds: Seeds = None,
    ) -> None:  # fmt: skip
        _run({name: function}, small, out, model, pairs, tweets, steps, seeds)

    app.command(name, help=(function.__doc__ or "").split("\n")[0])(command)


for _name, _function in COMMANDS.items():
    _add(_name, _function)


@app.command("all")
def _all(
    small: Small = False, out: Out = Path("paper-out"), model: Model = None, pairs: Pairs = None,
    tweets: Tweets = None, steps: Steps = None, seeds: Seeds = None,
) -> None:  # fmt: skip
    """Everything, and reproduction.md."""
    since = time.monotonic()
    lab, outcomes = _run(COMMANDS, small, out, model, pairs, tweets, steps, seeds)
    told = {"--small": small, "--model": model and shown_name(model), "--pairs": pairs and Path(pairs).name,
            "--tweets": tweets and Path(tweets).name, "--steps": steps, "--seeds": seeds}  # fmt: skip
    words = [f"{option}{'' if value is True else f' {value}'}" for option, value in told.items() if value]
    command = " ".join(["python -m examples.paper all", *words, f"--out {out.resolve().name}"])
    path = write_page(lab, outcomes, command=command, seconds=time.monotonic() - since)
    print(f"Wrote {path}.")


def _run(
    commands: dict[str, Callable[[Lab], Outcome]], small: bool, out: Path, model: str | None, pairs: str | None,
    tweets: str | None, steps: int | None, seeds: int | None,
) -> tuple[Lab, list[Outcome]]:  # fmt: skip
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's experimental trainers announce themselves
    console = Console(highlight=False)
    try:
        _require_trl()
        settings = choose_settings(small, steps, seeds, model)
        settings = replace(
            settings, comparisons=_hub_id("--pairs", pairs) or settings.comparisons,
            tweets=_hub_id("--tweets", tweets) or settings.tweets,
        )  # fmt: skip
        lab = Lab(
            settings, out, data=_file(pairs), tweets=_file(tweets),
            say=lambda line: console.print(line, style="dim", soft_wrap=True),
        )  # fmt: skip
        outcomes = []
        for name, function in commands.items():
            with lab.threads():
                outcomes.append(function(lab))
            _show(outcomes[-1], console)
            console.print(f"Wrote {lab.table(name)}" + (f", {lab.image(name)}" if outcomes[-1].image else ""))
    except GradentError as error:
        Console(stderr=True, highlight=False).print(Text(str(error), "red"), soft_wrap=True)
        raise typer.Exit(2) from None
    return lab, outcomes


def _file(source: str | None) -> Path | None:
    return Path(source) if source is not None and Path(source).is_file() else None


def _hub_id(option: str, source: str | None) -> str | None:
    """What is no file is the hub's, if it can be."""
    if source is None or _file(source) is not None:
        return None
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or source.endswith((".json", ".jsonl")):
        raise InputError(f"{option} is {source}, which is no file; accepted are a JSONL file or a hub id, owner/name.")
    return source


def _require_trl() -> None:
    found = version("trl")
    if int(found.split(".")[0]) < 1:  # its trainers lay their batches out differently
        raise InputError(f'TRL 1.0 or newer is needed, and {found} is installed: pip install --upgrade "trl>=1".')


def _show(outcome: Outcome, console: Console) -> None:
    table = Table(box=None, padding=(0, 1), header_style="dim", title=outcome.name, title_justify="left")
    for name in ("claim", "paper", "here", ""):
        table.add_column(name)
    for claim in outcome.claims:
        colour = "green" if claim.holds else "bold red"
        table.add_row(Text(claim.claim), Text(claim.paper), Text(claim.ours), Text(claim.verdict, colour))
    console.print(table)
    for note in outcome.notes:
        console.print(Text(note, "dim"))
