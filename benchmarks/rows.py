"""What all products among N rows cost beside the pairs among them: `measure_rows(among="all")` against `measure`.

    python -m benchmarks.rows

The models of benchmarks/peers.py: a GPT-2, all of it trainable, with tied embeddings, and a Llama under LoRA (r=16 on
every linear layer), float32, N = 8 rows of up to 192 and of up to 512 tokens, ragged, four pairs of `measure`. Products
are first compared with float64 autograd, one unpadded row at a time, scaled by the norms; what is wrong is not timed.
Then the two take turns in rounds, each called once before the call that counts; seconds are medians, and the ratio is
the median over rounds of a round's own. The clock is the process's own seconds, or `--clock wall`. `flops` are those of
the matrix products of a call, counted by torch: they do not hang on what else the machine does. Appends a line a case
to benchmarks/results/rows.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import statistics
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.append import append
from benchmarks.peer_methods import trainable
from benchmarks.peers import CLOCKS, EXACT, SIZES, build, draw
from gradent import PairBatch, measure, measure_rows

MODELS = ("GPT-2, full", "Llama, LoRA")
ROWS = 8


def products(model: nn.Module, batch: PairBatch) -> Tensor:
    """`⟨g_i, g_j⟩` by float64 autograd, `[N, N]`."""
    model = copy.deepcopy(model).double()
    flat = []
    for row in range(len(batch.input_ids)):
        ids, marks = batch.row(row)
        scores = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        logp = (scores.gather(1, ids[1:, None])[:, 0] * marks[1:]).sum()
        flat.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(logp, trainable(model))]))
    rows = torch.stack(flat)
    return rows @ rows.T


def scaled_error(found: Tensor, true: Tensor) -> float:
    """The largest error by the norms' product."""
    norms = true.diagonal().sqrt()
    return float(((found - true).abs() / torch.outer(norms, norms)).max())


def flops_of(call: Callable[[], Any]) -> int:
    """Of matrix products."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each case.")] = 7,
    tokens: Annotated[str, typer.Option(help="Tokens of the longest row, comma-separated.")] = "192,512",
    size: Annotated[str, typer.Option(help=f"Of the models: {', '.join(SIZES)}.")] = "mini",
    clock: Annotated[str, typer.Option(help=f"Of {', '.join(CLOCKS)}.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    save: Annotated[bool, typer.Option(help="Append to the results.")] = True,
) -> None:
    """Measure, print and append."""
    torch.set_num_threads(threads)
    console, now = Console(width=120), CLOCKS[clock]
    table = Table("model", "tokens", "error", "pairs (s)", "all (s)", "ratio", "flops' ratio")
    for kind in MODELS:
        model = build(kind, torch.float32, SIZES[size])
        vocabulary = SIZES[size].gpt2_vocabulary if kind == MODELS[0] else SIZES[size].llama_vocabulary
        for longest in map(int, tokens.split(",")):
            batch = draw(ROWS // 2, longest, vocabulary)
            calls = {"pairs": lambda: measure(model, batch), "all": lambda: measure_rows(model, batch, "all")}  # noqa: B023
            error = scaled_error(measure_rows(model, batch, "all").products, products(model, batch))
            if not error <= EXACT:
                raise SystemExit(f"{kind}, {longest} tokens: wrong by {error:.1e}")
            flops = {name: flops_of(call) for name, call in calls.items()}
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    call()
                    began = now()
                    call()
                    seconds[name].append(now() - began)
            medians = {name: statistics.median(taken) for name, taken in seconds.items()}
            ratio = statistics.median(a / p for a, p in zip(seconds["all"], seconds["pairs"], strict=True))
            share = flops["all"] / flops["pairs"]
            table.add_row(
                kind, str(longest), f"{error:.1e}", f"{medians['pairs']:.3f}", f"{medians['all']:.3f}", f"{ratio:.3f}",
                f"{share:.3f}",
            )  # fmt: skip
            if save:
                append("rows", {
                    "threads": threads, "clock": clock, "model": f"{kind} ({size})", "rows": ROWS, "tokens": longest,
                    "error": error, "pairs_seconds": medians["pairs"], "all_seconds": medians["all"], "ratio": ratio,
                    "pairs_flops": flops["pairs"], "all_flops": flops["all"],
                })  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
