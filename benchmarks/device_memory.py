"""The part of benchmarks/device.py that holds reductions to `memory_budget`, by the device allocator's own count.

Letters: O and I the two sides of a weight, T tokens of a chosen row, k pairs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.device_bench import Bench
from benchmarks.device_kernels import runs_kernels
from benchmarks.reduced import reduce_rows
from gradent.kernels import availability, dispatch
from gradent.kernels.common.cost import cheapest
from gradent.kernels.common.wanted import Wanted

__all__ = ["memory"]

TOKENS = (8192, 2048, 512, 64, 1)
SIZES = (14336, 4096, 1024, 16)
PAIRS = (32, 4, 1)
BUDGETS = (256 * 2**20, 16 * 2**20, 2**20, 64 * 2**10)
TOYS: tuple[tuple[int, ...], ...] = ((20,), (40,), (2, 1), (2**16, 400))

SMALL = 16 * 1024
"""What a reduction needs besides its scratch: results and sums of runs, each rounded up to the allocator's blocks."""

LAUNCHES = 20_000
"""Most launches of a case in torch's tiles, about a fifth of a second; beyond, it is left out."""


class Case(NamedTuple):
    """One reduction."""

    tokens: int
    rows: int
    cols: int
    pairs: int
    budget: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a pair's two rows, where it is reduced alone."""
        return self.tokens, max(1, self.tokens * 2 // 3)


def memory(bench: Bench) -> None:
    """A row for each budget and T, with its worst case; what takes too long in torch's tiles is counted.

    Raises:
        RuntimeError: a case took more than its budget.
    """
    tokens, sizes, pairs, budgets = TOYS if bench.toy else (TOKENS, SIZES, PAIRS, BUDGETS)
    largest = 2 * max(pairs) * max(tokens) * max(sizes)
    buffers = [torch.empty(largest, dtype=torch.bfloat16, device=bench.device).normal_() for _ in range(2)]
    _compile(
        bench, [Case(*one, budgets[0]) for one in itertools.product(sorted(tokens)[:3], sizes, sizes, pairs)], buffers
    )
    groups = list(itertools.product(budgets, tokens))
    over: list[str] = []
    for number, (budget, length) in enumerate(groups):
        if bench.left <= 0:
            bench.say(f"out of time: {len(groups) - number} of {len(groups)} groups are left out.")
            break
        cases = [Case(length, *shape, count, budget) for count in pairs for shape in itertools.product(sizes, sizes)]
        over += _group(bench, cases, buffers, time.perf_counter() + bench.left / (len(groups) - number))
    if over:
        raise RuntimeError(f"above the budget: {'; '.join(over)}")


def _compile(bench: Bench, cases: list[Case], buffers: list[Tensor]) -> None:
    """Call reductions of short rows, within half of the time: what is compiled for them serves long rows too."""
    began, half = time.perf_counter(), bench.left / 2
    for case in cases:
        if time.perf_counter() - began < half:
            for _, reduce in _ways(case, buffers):
                reduce()


def _group(bench: Bench, cases: list[Case], buffers: list[Tensor], ends: float) -> list[str]:
    """Cases of one budget and T; those above the budget."""
    found: list[tuple[int, str, Case]] = []
    dear = late = 0
    for case in cases:
        if time.perf_counter() > ends and found:
            late += 1
            continue
        if _launches(bench, case) > LAUNCHES:
            dear += 1
            continue
        for way, reduce in _ways(case, buffers):
            reduce()  # compiles, and gives libraries their workspaces
            found.append((bench.peak(reduce), way, case))
    if not found:
        bench.say(
            f"{cases[0].budget} bytes, T={cases[0].tokens}: all {len(cases)} cases are too dear in torch's tiles."
        )
        return []
    peak, way, case = max(found)
    left = f"{dear} too dear and {late} too late left out" if dear or late else "none left out"
    bench.put(
        "scratch",
        dtype="bfloat16",
        rows=case.rows,
        cols=case.cols,
        tokens=case.tokens,
        pairs=case.pairs,
        path=availability.path(bench.device, torch.bfloat16),
        budget_mib=case.budget / 2**20,
        peak_mib=peak / 2**20,
        of_budget=peak / case.budget,
        note=f"worst of {len(found)} reductions, {way}; {left}",
    )
    return [f"{size} bytes, {how}, {one}" for size, how, one in found if size > one.budget + SMALL]


def _ways(case: Case, buffers: list[Tensor]) -> list[tuple[str, Callable[[], Any]]]:
    """All pairs at once and, of a single pair, its two rows with lengths of their own."""
    shape = 2 * case.pairs, case.tokens
    u, v = (
        flat[: shape[0] * shape[1] * size].view(*shape, size)
        for flat, size in zip(buffers, (case.rows, case.cols), strict=True)
    )
    ways: list[tuple[str, Callable[[], Any]]] = [
        ("pairs at once", lambda: reduce_rows(u, v, Wanted.pairs(case.pairs), budget=case.budget))
    ]
    if case.pairs == 1:
        pair = [(u[row, : case.lengths[row]], v[row, : case.lengths[row]]) for row in (0, 1)]
        ways.append(("ragged pair", lambda: dispatch.reduce_group(pair, budget=case.budget)))
    return ways


def _launches(bench: Bench, case: Case) -> int:
    """About how many kernels torch's tiles would launch; 0 where Triton's kernels fit the budget."""
    tokens, rows, cols, pairs, budget = case
    plan = cheapest((tokens, tokens), rows, cols, itemsize=4, budget=budget, widen=True)
    if runs_kernels(bench.device) and availability.path(bench.device, torch.bfloat16) == "triton":
        from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415
        from gradent.kernels.gram.triton import gram_scratch  # noqa: PLC0415  (imports Triton)
        from gradent.kernels.outer.triton import outer_scratch  # noqa: PLC0415

        u, v = (torch.empty(tokens, size, dtype=torch.bfloat16, device="meta") for size in (rows, cols))
        scratch = gram_scratch if plan.form == "gram" else outer_scratch
        if scratch(u, v, u, v, Spans.of_pair(tokens, tokens)) <= budget:
            return 0
    sides, depth = ((tokens, tokens), rows + cols) if plan.form == "gram" else ((rows, cols), 2 * tokens)
    tiles = -(-sides[0] // plan.tile[0]) * -(-sides[1] // plan.tile[1]) * (3 if plan.form == "gram" else 1)
    return pairs * tiles * (4 * -(-depth // plan.depth) + 6)
