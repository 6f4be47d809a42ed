"""The part of benchmarks/device.py that finds where gram and outer cross on a device.

Letters: O and I the two sides of a weight, T tokens of both rows of a pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.device_bench import Bench
from benchmarks.device_kernels import Case, Operands, runs_kernels

__all__ = ["cross"]

CROSSED = ((4096, 4096), (14336, 4096), (1024, 4096), (2048, 2048))
STEPS = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 3.0)
"""Lengths, in times of ⅔h."""


def cross(bench: Bench) -> None:
    """Where gram and outer cross, beside the rule `T = ⅔h` that the plan goes by."""
    able = runs_kernels(bench.device)
    path = "triton" if able else "torch"
    for rows, cols in ((24, 24),) if bench.toy else CROSSED:
        rule = 2 / 3 * rows * cols / (rows + cols)
        ratios: dict[int, float] = {}
        for tokens in sorted({max(16, round(rule * step / 16) * 16) for step in STEPS}):
            if bench.left <= 0:
                bench.say(f"out of time at T={tokens} of {rows}×{cols}.")
                break
            ratios[tokens] = _both(bench, Case(rows, cols, tokens, 1), rule, able=able)
        if len(ratios) > 1:
            _crossing(bench, (rows, cols), rule, ratios, path)


def _both(bench: Bench, case: Case, rule: float, *, able: bool) -> float:
    """Rows of both forms; gram's time over outer's."""
    given = Operands(bench, case)
    run = given.by_kernel if able else given.by_torch
    times = bench.turns({form: lambda form=form: run(form) for form in ("gram", "outer")}, rounds=15, seconds=0.5)
    ratio = times["gram"].median / times["outer"].median
    for form, taken in times.items():
        bench.put(
            form,
            **case.columns,
            **taken.columns,
            path="triton" if able else "torch",
            tflops=given.flops(form, kernel=able) / taken.median / 1e9,
            ratio=ratio if form == "gram" else 1.0,
            against="outer",
            rule=rule,
        )
    return ratio


def _crossing_of(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The last T at which gram's time over outer's passes 1; None where it does not."""
    points = list(zip(lengths, ratios, strict=True))
    for (low, below), (high, above) in reversed(list(pairwise(points))):
        if below < 1 <= above:
            return low * (high / low) ** (math.log(1 / below) / math.log(above / below))
    return None


def _crossing(bench: Bench, shape: tuple[int, int], rule: float, ratios: dict[int, float], path: str) -> None:
    """A row of where they cross, and of what the rule's choice costs at worst."""
    found = _crossing_of(list(ratios), list(ratios.values()))
    costs = (max(1.0, ratio if tokens < rule else 1 / ratio) for tokens, ratio in ratios.items())
    bench.put(
        "crossing",
        dtype="bfloat16",
        rows=shape[0],
        cols=shape[1],
        tokens="" if found is None else round(found),
        path=path,
        ratio="" if found is None else found / rule,
        against="⅔h",
        rule=rule,
        note=f"the rule at worst {max(costs):.2f} times the faster form",
    )
