"""Where gram and outer cross: seconds of both contractions of one pair, beside the cost model's ⅔h.

    python -m benchmarks.crossover

For weights of several shapes `[O, I]` and rows of T = 16 to 4,096 tokens: both forms as the reference
runs them, each in one tile of whatever size, float32, one thread. They first agree with each other; times are medians
of rounds in which the two take turns. The crossing is where the ratio of times is 1 on a line through the two lengths
around it, both axes logarithmic; the cost model says `T = ⅔h`, `h = O I / (O + I)`. "The rule at worst" is the most
time that ⅔h's choice took at any length, in times of the faster form.

Appends a line a shape and length to benchmarks/results/crossover.csv, and puts the latest of them into docs/kernels.md
(`--no-docs` leaves the page alone).
"""

from __future__ import annotations

import csv
import math
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.append import RESULTS, append
from gradent.kernels.common.cost import Plan
from gradent.kernels.common.numerics import reduce_planned

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- crossover: written by benchmarks/crossover.py -->", "<!-- end of crossover -->"

SHAPES = ((576, 576), (576, 1536), (768, 3072), (1024, 4096), (2048, 2048))
LENGTHS = tuple(2**power for power in range(4, 13))
AGREE = 1e-5
"""Most that the two forms may differ, relative to the largest entry."""


def plans(tokens: int, rows: int, cols: int) -> tuple[Plan, Plan]:
    """Gram and outer in one tile."""
    flops = 6 * tokens**2 * (rows + cols), 4 * tokens * rows * cols
    gram = Plan(form="gram", tile=(tokens, tokens), depth=max(rows, cols), flops=flops[0], scratch=0)
    outer = Plan(form="outer", tile=(rows, cols), depth=tokens, flops=flops[1], scratch=0)
    return gram, outer


def compare(tokens: int, rows: int, cols: int, rounds: int, budget_s: float) -> tuple[Plan, Plan, float, float]:
    """Both plans, and the seconds of each."""
    source = torch.Generator().manual_seed(0)
    sizes = (rows, cols, rows, cols)
    operands: list[Tensor] = [torch.randn(tokens, size, generator=source) for size in sizes]
    both = plans(tokens, rows, cols)
    u_w, v_w, u_l, v_l = operands
    entries = [reduce_planned(u_w, v_w, u_l, v_l, plan) for plan in both]  # warm, and right
    worst = float((entries[0] - entries[1]).abs().max() / entries[1].abs().max())
    if not worst <= AGREE:
        raise RuntimeError(f"gram and outer differ by {worst:.1e} at T={tokens}, [{rows}, {cols}]")
    seconds: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    while len(seconds[0]) < rounds and (len(seconds[0]) < 3 or time.perf_counter() - began < budget_s):
        for plan, taken in zip(both, seconds, strict=True):
            start = time.perf_counter()
            reduce_planned(u_w, v_w, u_l, v_l, plan)
            taken.append(time.perf_counter() - start)
    return *both, statistics.median(seconds[0]), statistics.median(seconds[1])


def crossing(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """T at which gram's time over outer's passes 1; None where it does not.

    Args:
        lengths: T, rising.
        ratios: gram's time over outer's, at each.

    Returns:
        The last such T.
    """
    points = list(zip(lengths, ratios, strict=True))
    for (low, below), (high, above) in reversed(list(pairwise(points))):
        if below < 1 <= above:
            part = math.log(1 / below) / math.log(above / below)
            return low * (high / low) ** part
    return None


def write_page() -> None:
    """Put the table of the latest run into the page, from the CSV."""
    with open(RESULTS / "crossover.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    latest: dict[tuple[int, int], dict[int, dict[str, str]]] = {}
    for row in rows:  # a later run of a shape takes the place of an earlier one
        shape = int(row["rows"]), int(row["cols"])
        latest.setdefault(shape, {})[int(row["tokens"])] = row
    last = rows[-1]
    lines = [
        f"{last['device']}, {last['threads']} thread, {last['dtype']}, torch {last['torch']}, {last['date']}, commit "
        f"{last['commit']}:",
        "",
        "| O×I | ⅔h | measured crossing | of ⅔h | gram's time over outer's |",
        "|---|---|---|---|---|",
    ]
    for (height, width), found in latest.items():
        model = 2 / 3 * height * width / (height + width)
        ratios = {length: float(found[length]["ratio"]) for length in sorted(found)}
        at, share = _where(crossing(list(ratios), list(ratios.values())), model)
        near = [f"{ratio:.2f} at {length}" for length, ratio in ratios.items() if model / 4 < length < 4 * model]
        lines.append(f"| {height}×{width} | {model:.0f} | {at} | {share} | {', '.join(near)} |")
    text = PAGE.read_text("utf-8")
    head, begun, rest = text.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not begun or not ended:
        raise RuntimeError(f"{PAGE} lacks {BEGIN!r} or {END!r}, between which the table goes")
    PAGE.write_text("\n".join([head + BEGIN, "", *lines, "", END]) + tail, "utf-8")


def _where(found: float | None, model: float) -> tuple[str, str]:
    return ("none", "") if found is None else (f"{found:.0f}", f"{found / model:.2f}")


def main(
    rounds: Annotated[int, typer.Option(help="Most runs of each form and size.")] = 15,
    seconds: Annotated[float, typer.Option(help="Most time for a size, after three runs.")] = 3.0,
    longest: Annotated[int, typer.Option(help="Longest rows.")] = LENGTHS[-1],
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    docs: Annotated[bool, typer.Option(help="Write docs/kernels.md.")] = True,
) -> None:
    """Measure every shape and length, print the crossings, append the figures to the results."""
    torch.set_num_threads(threads)
    lengths = [length for length in LENGTHS if length <= longest]
    table = Table("O×I", "⅔h", "crossing", "of ⅔h", "the rule at worst")
    for rows, cols in SHAPES:
        model = 2 / 3 * rows * cols / (rows + cols)
        ratios: list[float] = []
        wrong = 1.0
        for tokens in lengths:
            gram, outer, gram_s, outer_s = compare(tokens, rows, cols, rounds, seconds)
            ratios.append(gram_s / outer_s)
            taken, best = (gram_s if tokens < model else outer_s), min(gram_s, outer_s)
            wrong = max(wrong, taken / best)
            figures: dict[str, Any] = {
                "dtype": "float32", "threads": threads, "rows": rows, "cols": cols, "tokens": tokens,
                "two_thirds_h": model, "gram_s": gram_s, "outer_s": outer_s, "ratio": ratios[-1],
                "gram_gflops": gram.flops / gram_s / 1e9, "outer_gflops": outer.flops / outer_s / 1e9,
            }  # fmt: skip
            append("crossover", figures)
        at, share = _where(crossing(lengths, ratios), model)
        table.add_row(f"{rows}×{cols}", f"{model:.0f}", at, share, f"{wrong:.2f}")
    Console().print(table)
    if docs:
        write_page()


if __name__ == "__main__":
    typer.run(main)
