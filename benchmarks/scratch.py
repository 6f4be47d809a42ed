"""Whether reductions stay inside `memory_budget`, measured: a sweep over shapes, with the CPU allocator's own count.

    python -m benchmarks.scratch 2> /dev/null

(The profiler announces every case on stderr.) Every case gives a ledger the forms of its pairs as a backward pass does,
row by row (`add`, then `finish`) or as one batch (`whole`, or products that wait for others), and counts what the
reduction takes: torch's profiler reports every block that the CPU allocator hands out and takes back, also those within
an operator. Operands were there before and are not counted. Cases: T from 1 to 8,192 (rejected rows are shorter by a
third), I and O from 16 to 14,336, 1 and 32 pairs, float32 and bfloat16, budgets of 64 and 256 MiB. Two more ways are
measured for one pair: a tied head of O words, of which the lookups' rows are kept and not counted (`tied`), and a layer
norm of I numbers whose row has a forward of its own (`norm`). Cases above `--gflops` are left out, but for the ones in
`LARGEST`; how many that are is printed. Appends a line for each T, dtype, budget and way, with the worst case in it, to
benchmarks/results/scratch.csv. Exits with 1 if any case takes more than its budget.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.append import append
from gradent.hooks.reduction.collector import REDUCERS, Arrival, Place
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import Factored, SparseRows
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.parameter_views import View
from gradent.hooks.uses.uses import MatrixUse, SumUse
from gradent.kernels.common.cost import cheapest
from gradent.kernels.common.numerics import accumulator
from gradent.kernels.common.wanted import Wanted
from gradent.kernels.strategy import Product, decide

TOKENS = (1, 64, 512, 2048, 8192)
SIZES = (16, 1024, 4096, 14336)
PAIRS = (1, 32)
DTYPES = (torch.float32, torch.bfloat16)
BUDGETS = (64 * 2**20, 256 * 2**20)


class Case(NamedTuple):
    """One reduction: tokens of a chosen row, the weight's `[rows, cols]`, pairs."""

    tokens: int
    rows: int
    cols: int
    pairs: int
    dtype: torch.dtype
    budget: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a pair's two rows."""
        return self.tokens, max(1, self.tokens * 2 // 3)

    @property
    def gflops(self) -> float:
        """Of all pairs."""
        wide = accumulator(self.dtype)
        widen = wide != self.dtype
        sizes = self.lengths, self.rows, self.cols
        return self.pairs * cheapest(*sizes, itemsize=wide.itemsize, budget=self.budget, widen=widen).flops / 1e9


LARGEST = (
    Case(8192, 14336, 14336, 1, torch.bfloat16, BUDGETS[0]),
    Case(8192, 14336, 4096, 1, torch.float32, BUDGETS[0]),
    Case(512, 14336, 14336, 32, torch.bfloat16, BUDGETS[0]),
    Case(8192, 4096, 4096, 1, torch.float32, BUDGETS[0]),  # a tile that fills the budget to the byte
)
"""Dearer than the rest, and measured all the same."""


def taken(function: Callable[[], Any]) -> int:
    """Most bytes that the CPU allocator had handed out at once during a call, beyond what it had before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        function()
    results = profiler.kineto_results
    assert results is not None
    now = most = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def by_rows(case: Case) -> int:
    """Scratch of `Ledger.finish`."""
    ledger = Ledger(Wanted.pairs(case.pairs), budget=case.budget)
    u, v = (torch.randn(case.tokens, size, dtype=torch.float32).to(case.dtype) for size in (case.rows, case.cols))
    for row in range(2 * case.pairs):
        count = case.lengths[row >= case.pairs]
        ledger.add(0, row, (), Factored(u[:count], v[:count]))
    return taken(lambda: ledger.finish(0))


def by_batch(case: Case) -> int | None:
    """Scratch of all rows at once, reduced or left to wait for others of their size; None if `decide` is against it."""
    wanted = Wanted.pairs(case.pairs)
    product = Product(
        rows=wanted.rows, lengths=(case.tokens,) * 2, out=case.rows, inp=case.cols, dtypes=(case.dtype, case.dtype),
        is_complete=True,
    )  # fmt: skip
    strategy = decide(product, case.budget)
    if strategy.reducer == "group_by_group":
        return None
    ledger = Ledger(wanted, budget=case.budget)
    u, v = (torch.randn(wanted.rows, case.tokens, size).to(case.dtype) for size in (case.rows, case.cols))
    use = MatrixUse(View(0, (), (case.rows, case.cols)), v, swapped=False)
    arrival = Arrival(use, u, Place(Layout(wanted.rows, case.tokens), range(wanted.rows)))

    def reduce() -> None:
        if not REDUCERS[strategy.reducer](ledger, arrival, strategy):
            ledger.finish(0)
            ledger.close()

    return taken(reduce)


def by_tied_head(case: Case) -> int | None:
    """Scratch of `Ledger.shrink`, and of `finish` with the lookups, whichever is more; None for several pairs."""
    if case.pairs > 1:
        return None
    ledger = Ledger(Wanted.pairs(1), budget=case.budget)
    ids = [torch.arange(0, case.rows, 2)[:count].flip(0) for count in case.lengths]
    u, v = (torch.randn(case.tokens, size).to(case.dtype) for size in (case.rows, case.cols))
    for row, count in enumerate(case.lengths):
        ledger.add(0, row, (), Factored(u[:count], v[:count]))
    kept = 2 * len(ids[0]) * case.cols * accumulator(case.dtype).itemsize
    first = taken(lambda: ledger.shrink(0, ids.__getitem__)) - kept
    for row, some in enumerate(ids):
        ledger.add(0, row, (), SparseRows(some, v[: len(some)]))
    return max(first, taken(lambda: ledger.finish(0)))


def by_norm(case: Case) -> int | None:
    """Scratch of the gradient of a norm's weight; None for several pairs, and once for each number of columns."""
    if case.pairs > 1 or case.rows != SIZES[0]:
        return None
    x, b = (torch.randn(1, case.tokens, case.cols).to(case.dtype) for _ in range(2))
    width, wide = (case.cols,), accumulator(case.dtype)
    use = SumUse(View(0, (), width), torch.Size(width), lambda cut: F.layer_norm(cut(x).to(wide), width))
    return taken(lambda: use.gradients(b, Layout(1, case.tokens), case.budget))


WAYS: dict[str, Callable[[Case], int | None]] = {
    "rows": by_rows,
    "batch": by_batch,
    "tied": by_tied_head,
    "norm": by_norm,
}


def sweep(gflops: float) -> tuple[list[Case], int]:
    """The cases, and how many are left out as too dear."""
    every = [Case(*one) for one in itertools.product(TOKENS, SIZES, SIZES, PAIRS, DTYPES, BUDGETS)]
    kept = [case for case in every if case.gflops <= gflops or case in LARGEST]
    return kept, len(every) - len(kept)


def main(
    gflops: Annotated[float, typer.Option(help="Leave out cases above this.")] = 60.0,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    save: Annotated[bool, typer.Option(help="Append to the results.")] = True,
) -> None:
    """Run the sweep, print and append the worst of each group."""
    torch.set_num_threads(threads)
    console = Console(width=120)
    cases, dropped = sweep(gflops)
    found: dict[tuple[str, int, int, torch.dtype], list[tuple[int, Case]]] = defaultdict(list)
    began = time.perf_counter()
    for case in cases:
        for way, measured in WAYS.items():
            peak = measured(case)
            if peak is not None:
                found[way, case.budget, case.tokens, case.dtype].append((peak, case))
    seconds = time.perf_counter() - began
    table = Table("way", "budget (MiB)", "T", "dtype", "cases", "most (MiB)", "of the budget", "in the case")
    over = 0
    for (way, budget, tokens, dtype), group in sorted(found.items(), key=lambda item: (*item[0][:3], str(item[0][3]))):
        peak, case = max(group)
        over += sum(one > budget for one, _ in group)
        shown, name = f"[{case.rows}, {case.cols}], {case.pairs} pairs", str(dtype).removeprefix("torch.")
        table.add_row(
            way, str(budget >> 20), str(tokens), name, str(len(group)), f"{peak / 2**20:.2f}", f"{peak / budget:.4f}",
            shown,
        )  # fmt: skip
        if save:
            append("scratch", {
                "threads": threads, "way": way, "budget_mib": budget >> 20, "tokens": tokens, "dtype": name,
                "cases": len(group), "most_mib": peak / 2**20, "of_budget": peak / budget, "case": shown,
            })  # fmt: skip
    console.print(table)
    total = sum(map(len, found.values()))
    console.print(f"{total} cases in {seconds:.0f} s, {over} above their budget; {dropped} left out as too dear.")
    if over:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
