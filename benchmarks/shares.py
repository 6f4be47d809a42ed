"""What each kind of parameter takes of a measurement: would biases, norms, embeddings or a head need a kernel?

    python -m benchmarks.shares

The GPT-2 of benchmarks/peers.py at its own size, all of it trainable, with a tied head; float32, ragged pairs. Counted
are the process's own seconds while a use's cotangent is taken and reduced, by the kind of the use. The tied weight's
own part is reduced when the head's cotangent comes, its cross terms with the lookups are when theirs do. Shares are of
the whole measurement, medians over rounds. Appends a line a kind to benchmarks/results/shares.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.append import append
from benchmarks.peers import CASES, SIZES, build, draw
from gradent import measure
from gradent.hooks.reduction.collector import Collector
from gradent.hooks.reduction.small_gradients import SmallGradients
from gradent.hooks.uses.uses import LookupUse, SumUse

MODEL = "GPT-2, full"
KINDS = ("matrices", "head", "embeddings", "biases and norms")


def kind_of(use: object, cotangent: torch.Tensor, vocabulary: int) -> str:
    """Of `KINDS`; learned positions count as a norm does, they are added."""
    if isinstance(use, LookupUse):
        return "embeddings"
    if isinstance(use, SumUse):
        return "biases and norms"
    return "head" if cotangent.shape[-1] == vocabulary else "matrices"


@contextmanager
def watched(owner: type, name: str, kind: Callable[..., str], seconds: dict[str, float]) -> Iterator[None]:
    """Add up what a method takes, by what `kind` says of its arguments."""
    inner = getattr(owner, name)

    def timed(*given: Any, **more: Any) -> Any:
        which, began = kind(*given, **more), time.process_time()
        try:
            return inner(*given, **more)
        finally:
            seconds[which] += time.process_time() - began

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, inner)


def main(
    rounds: Annotated[int, typer.Option(help="Measurements of each case.")] = 5,
    cases: Annotated[str, typer.Option(help=f"Pairs, comma-separated: {', '.join(CASES)}.")] = "single,medium",
    size: Annotated[str, typer.Option(help=f"Of the model: {', '.join(SIZES)}.")] = "small",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    save: Annotated[bool, typer.Option(help="Append to the results.")] = True,
) -> None:
    """Measure, print and append the shares."""
    torch.set_num_threads(threads)
    vocabulary, console = SIZES[size].gpt2_vocabulary, Console(width=120)
    model = build(MODEL, torch.float32, SIZES[size])
    for case in cases.split(","):
        batch = draw(*CASES[case], vocabulary)
        measure(model, batch)
        found: list[tuple[float, dict[str, float]]] = []
        for _ in range(rounds):
            seconds: dict[str, float] = defaultdict(float)
            arrive = watched(Collector, "arrive", lambda _, tap, b, *rest: kind_of(tap.use, b, vocabulary), seconds)
            with arrive, watched(SmallGradients, "reduce", lambda *given: "biases and norms", seconds):
                began = time.process_time()
                measure(model, batch)
                found.append((time.process_time() - began, seconds))
        pairs, tokens = CASES[case]
        table = Table("kind", "seconds", "share of measure", title=f"{MODEL} ({size}), {pairs} pairs, T ≤ {tokens}")
        for kind in KINDS:
            taken = statistics.median(seconds[kind] for _, seconds in found)
            share = statistics.median(seconds[kind] / whole for whole, seconds in found)
            table.add_row(kind, f"{taken:.4f}", f"{share:.1%}")
            if save:
                append("shares", {
                    "threads": threads, "model": f"{MODEL} ({size})", "pairs": pairs, "tokens": tokens,
                    "kind": kind, "seconds": taken, "share": share,
                })  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
