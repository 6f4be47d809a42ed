"""The budget bounds what a reduction allocates, counted at every operator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import scratch
from benchmarks.reduced import reduce_rows
from gradent.hooks.capture.capture import Capture
from gradent.hooks.passes.autograd_engine import plain_rows
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import (
    Factored,
    Materialized,
    SparseRows,
    bytes_scaled,
    scaled_rows,
)
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.uses import SumUse
from gradent.kernels.common.numerics import reduce_flat, reduce_tiles
from gradent.kernels.common.wanted import Wanted
from gradent.kernels.dispatch import reduce_group
from gradent.kernels.strategy import Product, decide
from gradent.kernels.with_weight_grad import reduce_with_sum
from tests.covering import cross
from tests.live import LiveBytes

SMALL = 16 * 1024
"""What a reduction needs besides its tiles, the float64 sums of runs and a few scalars, where the budget is so small
that the share which is left to them does not cover it."""


def most(budget: int) -> int:
    """What may be taken."""
    return budget + SMALL * (budget < 2**20)


CPU = torch.device("cpu")

SHAPES = [
    (64, 64, 2048, 2048),
    (2048, 1500, 256, 16),
    (700, 600, 512, 384),
    (600, 600, 1600, 1600),
    (3, 700, 99, 99),
]


@cross("shape, dtype, budget", SHAPES, [torch.float32, torch.float64, torch.bfloat16], [2**19, 2**22])
def test_dense(shape: tuple[int, int, int, int], dtype: torch.dtype, budget: int) -> None:
    t_w, t_l, rows, cols = shape
    factors = [tuple(torch.randn(count, size).to(dtype) for size in (rows, cols)) for count in (t_w, t_l)]
    with LiveBytes() as live:
        reduce_group(factors, budget=budget)  # type: ignore[arg-type]
    assert 0 < live.peak <= most(budget)


@pytest.mark.parametrize(("pairs", "numbers"), [(1, 40_000), (3, 40_000), (3, 2 * 16_384), (8, 100), (3, 0)])
def test_tiles_are_not_copied(pairs: int, numbers: int) -> None:
    tiles = torch.randn(2 * pairs, numbers)
    with LiveBytes() as live:
        entries = reduce_tiles(tiles, Wanted.pairs(pairs)).view(-1, 3)
    assert live.peak <= SMALL
    for pair, (x, y) in enumerate(zip(tiles[:pairs].double(), tiles[pairs:].double(), strict=True)):
        torch.testing.assert_close(entries[pair], torch.stack((x @ x, y @ y, x @ y)), rtol=1e-6, atol=1e-6 * numbers)


@pytest.mark.parametrize("power", [1.0, 2.0**-20, 2.0**-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_scaled_factors_count(power: float, dtype: torch.dtype) -> None:
    u, v = (torch.randn(4, 500, size).to(dtype) for size in (256, 40))
    with LiveBytes() as live:
        kept = scaled_rows(u, v, [power] * 4)
    copied = bytes_scaled(u, v, [power] * 4)
    assert copied == sum(one.nbytes for one, given in zip(kept, (u, v), strict=True) if one is not given)
    assert copied == 0 or copied <= live.peak
    sizes = {"rows": 4, "lengths": (500, 500), "out": 256, "inp": 40, "dtypes": (dtype, dtype), "is_complete": True}
    assert decide(Product(**sizes, copied=copied, has_factors=True), 2**23).reducer == "outer"  # type: ignore[arg-type]
    none_left = Product(**sizes, copied=2**23, has_factors=True)  # type: ignore[arg-type]
    assert decide(replace(none_left, copied=2**23 - 2**14), 2**23).reducer == "group_by_group"


def test_the_count_can_fail() -> None:
    operands = [torch.randn(100, 1000) for _ in range(4)]
    with LiveBytes() as live:
        reduce_flat(torch.stack([operands[0].T @ operands[1], operands[2].T @ operands[3]]).view(2, -1))
    assert live.peak >= 2 * 4 * 1000 * 1000


@pytest.mark.parametrize("budget", [2**16, 2**20])
def test_lookups(budget: int) -> None:
    ledger = Ledger(Wanted.pairs(1), budget=budget)
    for row in (0, 1):
        ledger.add(0, row, (), SparseRows(torch.randint(5000, (500,)), torch.randn(500, 1024)))
    with LiveBytes() as live:
        ledger.finish(0)
    assert live.peak <= most(budget)


def test_what_waits_counts_beside_a_large_reduction() -> None:
    budget = 4 * 2**20
    ledger = Ledger(Wanted.pairs(1), budget=budget)
    grads = [torch.randn(2, 16, 1000) for _ in range(4)]
    u, v = torch.randn(2, 700, 768), torch.randn(2, 700, 671)
    with LiveBytes() as live:
        waiting = [grad.clone() for grad in grads]
        for number, grad in enumerate(waiting):
            ledger.add_rows(number, [0, 1], (), grad)
            ledger.finish(number)
        for row in (0, 1):
            ledger.add(9, row, (), Factored(u[row], v[row]))
        ledger.finish(9)
    assert live.peak <= budget


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("budget", [2**17, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_before_its_lookups(dtype: torch.dtype, budget: int, weighted: bool) -> None:
    tokens, words, width = 300, 4000, 64
    weight = torch.rand(words, width) if weighted else None
    ledger = Ledger(Wanted.pairs(1), budget=budget, weight=None if weight is None else lambda param: weight)
    ids, gradients = [torch.randint(words, (tokens,)) for _ in range(2)], []
    for row in (0, 1):
        u, v = torch.randn(tokens, words).to(dtype), torch.randn(tokens, width).to(dtype)
        ledger.add(0, row, (), Factored(u, v))
        gradients.append(u.double().T @ v.double())
    kept = 2 * 4 * len(torch.cat(ids).unique()) * width  # forms, as large as the lookups that are still to come
    with LiveBytes() as live:
        ledger.shrink(0, ids.__getitem__)
    assert live.peak <= most(budget) + kept
    for row in (0, 1):
        values = torch.randn(tokens, width).to(dtype)
        ledger.add(0, row, (), SparseRows(ids[row], values))
        gradients[row].index_add_(0, ids[row], values.double())
    with LiveBytes() as live:
        ledger.finish(0)
    assert live.peak <= most(budget)
    chosen, rejected = (grad if weight is None else grad * weight for grad in gradients)
    want = torch.stack([(chosen * chosen).sum(), (rejected * rejected).sum(), (chosen * rejected).sum()])
    assert float((ledger.entries[0] - want).abs().max() / want[0]) <= 2e-6


@pytest.mark.parametrize("budget", [2**16, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "scale", "bias"])
def test_sums_over_positions(kind: str, rows: int, dtype: torch.dtype, budget: int) -> None:
    x, cotangent = (torch.randn(rows, 700, 256).to(dtype) for _ in range(2))
    weight = nn.Parameter(torch.randn(256).to(dtype))
    layout = Layout(rows, 700)
    with Capture([weight], layout, lambda tap, b: None) as capture:
        {
            "layer_norm": lambda: F.layer_norm(x, (256,), weight),
            "rms_norm": lambda: F.rms_norm(x, (256,), weight),
            "scale": lambda: weight * x,
            "bias": lambda: x + weight,
        }[kind]()
        (tap,) = capture.taps
        use = tap.use
    assert isinstance(use, SumUse)
    with LiveBytes() as live:
        found = use.gradients(cotangent, layout, budget)
    whole = use.gradients(cotangent, layout, 2**30)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-3)
    assert live.peak <= most(budget)


@pytest.mark.parametrize("budget", [2**16, 2**18, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_formed_already(dtype: torch.dtype, budget: int) -> None:
    ledger = Ledger(Wanted.pairs(2), budget=budget)
    for row in range(4):
        ledger.add(0, row, (), Materialized(torch.randn(16, 300).to(dtype)))
    with LiveBytes() as live:
        ledger.finish(0)
    pair = 2 * 2 * 4 * 16 * 300  # held whole whatever the budget: `measure` counts explicit gradients before
    assert live.peak <= max(budget, pair) + SMALL


@pytest.mark.parametrize("form", ["gram", "outer"])
def test_what_a_launch_allocates(form: str) -> None:
    """No more than its scratch and its result; in the interpreter, whose own arrays are numpy's and are not counted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from gradent.kernels.common import triton_operands as operands  # noqa: PLC0415  (imports Triton)
    from gradent.kernels.gram import triton as gram  # noqa: PLC0415
    from gradent.kernels.outer import triton as outer  # noqa: PLC0415

    run, needed = {
        "gram": (gram.gram_entries, gram.gram_scratch),
        "outer": (outer.outer_entries, outer.outer_scratch),
    }[form]
    lengths, widths = (([400, 40], [200, 250]), (5, 3)) if form == "gram" else (([5, 3], [2, 4]), (300, 400))
    spans = operands.Spans.packed(*lengths)
    factors = [torch.randn(sum(side), width) for side in lengths for width in widths]
    said, entries = needed(*factors, spans), 2 * 3 * 8
    operands._table.cache_clear()  # noqa: SLF001
    first = scratch.taken(lambda: run(*factors, spans))
    assert said / 2 < first <= said + entries
    assert scratch.taken(lambda: run(*factors, spans)) < first, "the table of spans is kept"


@pytest.mark.slow
@cross(
    "shape, pairs, dtype, budget",
    [(8192, 1024, 16), (512, 4096, 1024), (64, 14336, 4096), (64, 14336, 16)], [1, 4],
    [torch.float32, torch.bfloat16], [2**21, 2**26],
)  # fmt: skip
def test_the_allocator_agrees(shape: tuple[int, int, int], pairs: int, dtype: torch.dtype, budget: int) -> None:
    """A part of benchmarks/scratch.py: a ledger's reductions, by what the allocator itself says."""
    tokens, rows, cols = shape
    u, v = (torch.randn(2 * pairs, tokens, size).to(dtype) for size in (rows, cols))
    ledger = Ledger(Wanted.pairs(pairs), budget=budget)
    for row in range(2 * pairs):
        ledger.add(0, row, (), Factored(u[row], v[row]))
    assert 0 < scratch.taken(lambda: ledger.finish(0)) <= budget
    assert scratch.taken(lambda: reduce_rows(u, v, Wanted.pairs(pairs), budget=budget)) <= budget


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("sizes", [(1000,), (300, 20, 400), (7,) * 60])
def test_gradients_that_autograd_forms(sizes: tuple[int, ...], pairs: int) -> None:
    """`plain_rows` leaves room for their reduction, the gradients themselves included."""
    model = nn.ParameterList([torch.zeros(size, 100) for size in (*sizes, 100_000)])
    parameters = list(model)[:-1]
    budget = 3 * 2 * pairs * 4 * 100 * sum(sizes)
    assert plain_rows(model, parameters, CPU, budget) == 2 * pairs > plain_rows(model, parameters, CPU, budget - 1)

    def reduce() -> None:
        ledger = Ledger(Wanted.pairs(pairs), budget=budget)
        for row in range(2 * pairs):
            for number, parameter in enumerate(parameters):
                ledger.add_rows(number, [row], (), torch.ones_like(parameter)[None])
        ledger.close()

    assert budget / 3 < scratch.taken(reduce) <= most(budget) + 64 * len(sizes)


@cross(
    "shape, dtype, budget", [(2, 2000, 512, 640), (6, 300, 1024, 256), (3, 64, 2048, 1024)],
    [torch.float32, torch.bfloat16], [2**20, 2**23],
)  # fmt: skip
def test_shared(shape: tuple[int, int, int, int], dtype: torch.dtype, budget: int) -> None:
    """The sum, which is handed on, comes on top."""
    rows, tokens, height, width = shape
    u, v = (torch.randn(rows, tokens, size).to(dtype) for size in (height, width))
    places, pairs = [*range(2 * (rows // 2)), *[-1] * (rows % 2)], rows // 2
    factors = [2.0**-30] * rows
    taken = scratch.taken(lambda: reduce_with_sum(u, v, places, factors, wanted=Wanted.pairs(pairs), budget=budget))
    assert 0 < taken - 4 * height * width <= budget


@pytest.mark.parametrize("pairs", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 1024), (64, 16, 16), (512, 1024, 16), (64, 1024, 1024)])
def test_the_benchmark_of_scratch(shape: tuple[int, int, int], dtype: torch.dtype, pairs: int) -> None:
    case = scratch.Case(*shape, pairs, dtype, 2**26)
    assert 0 < scratch.by_rows(case) <= 2**26
    assert 0 < (scratch.by_batch(case) or 1) <= 2**26


def test_the_allocators_count_can_fail() -> None:
    a = torch.randn(1000, 1000)
    assert scratch.taken(lambda: (a + a) + (a + a)) >= 2 * 4 * 1000 * 1000
