"""NTHR's claim about GRPO, with exact values: do negatives lower their group's positives, and does its rule help?

    python -m benchmarks.nthr --model my-model    # the run of examples/grpo.py; a tiny model if left out
    python -m benchmarks.nthr --page              # the section of docs/groups.md again, without a run

Each arm of `ARMS` trains from the same seed: what it does to the positives of every step is measured by forwards before
and after. On every n-th batch of the plain run the exact effect of each rollout and token on the positives is measured,
and the step that each arm would take from that very state on that very batch. Appends a line a figure and seed to
benchmarks/results/nthr.csv and writes docs/groups.md, "NTHR's claim, measured", from all of them.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from grpo import make_start, make_trainer

from benchmarks.append import RESULTS, append
from benchmarks.nthr_arms import ARMS, ArmTrainer
from benchmarks.nthr_batches import Batches
from benchmarks.nthr_page import write

Figures = dict[tuple[str, str, str], float]
"""(Part, arm, figure) to its value."""


def train(
    model: str | None, arm: str, seed: int, *, steps: int, tokens: int, factor: float, every: int
) -> tuple[Figures, dict[str, object]]:
    """One run: its figures, and what of its settings is recorded."""
    torch.manual_seed(seed)
    start = make_start(model)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(
            start, out, steps=steps, tokens=tokens, seed=seed, trainer=ArmTrainer, arm=arm, factor=factor
        )
        batches = Batches(trainer, every, factor) if arm == "GRPO" and every else None
        if batches:
            trainer.add_callback(batches)
        trainer.train()
    change, advantage = (
        torch.cat([step[name] for step in trainer.steps.changes]).double() for name in ("change", "advantage")
    )
    positive, negative, rewards = change[advantage > 0], change[advantage < 0], trainer.rewards
    edge = max(1, min(10, steps // 3))
    values = {
        "positives_fell": float((positive < 0).double().mean()),
        "positive_change": float(positive.mean()),
        "negative_change": float(negative.mean()),
        "selected": trainer.selected / max(1, trainer.negative),
        "reward_first": sum(rewards[:edge]) / edge,
        "reward_last": sum(rewards[-edge:]) / edge,
        "reward": sum(rewards) / len(rewards),
    }
    figures: Figures = {("training", arm, name): value for name, value in values.items()}
    if batches:
        figures |= {("batches", *key): value for key, value in batches.sums.figures().items()}
    return figures, {"word": start.word, "rate": start.rate}


def main(
    model: Annotated[str | None, typer.Option(help="A folder, or a name on the hub; a tiny model if left out.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds.")] = 8,
    first: Annotated[int, typer.Option(help="The first of them.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 60,
    tokens: Annotated[int, typer.Option(help="Most tokens of a rollout.")] = 32,
    factor: Annotated[float, typer.Option(help="Of the advantage of down-weighted tokens.")] = 0.0,
    every: Annotated[int, typer.Option(help="Batches from one that is looked at to the next; 0 for none.")] = 6,
    arms: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(ARMS)}.")] = "GRPO,NTHR,random",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    page: Annotated[bool, typer.Option("--page", help="Write the page from the results, and train nothing.")] = False,
    save: Annotated[bool, typer.Option(help="Append to the results and write the page.")] = True,
) -> None:
    """Train, print and append the figures, write the page."""
    torch.set_num_threads(threads)
    console = Console(width=120)
    for seed in range(first, first + seeds) if not page else ():
        for arm in arms.split(","):
            figures, about = train(model, arm, seed, steps=steps, tokens=tokens, factor=factor, every=every)
            for (part, of, figure), value in figures.items():
                console.print(f"seed {seed} {part:8} {of:12} {figure:26} {value:9.4f}")
                if save:
                    settings = {"model": Path(model).name if model else "tiny", **about, "steps": steps}
                    settings |= {"tokens": tokens, "factor": factor, "seed": seed}
                    append("nthr", {**settings, "part": part, "arm": of, "figure": figure, "value": value})
    if page or save:
        write(RESULTS / "nthr.csv")


if __name__ == "__main__":
    typer.run(main)
