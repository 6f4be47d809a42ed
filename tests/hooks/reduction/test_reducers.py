"""Every reducer of the table against products in float64, over random ragged rows; and the plan against that."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradent.hooks.reduction import collector as module
from gradent.hooks.reduction.collector import REDUCERS, Arrival, Collector, Place
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.parameter_views import View
from gradent.hooks.uses.uses import MatrixUse
from gradent.kernels.common.wanted import Wanted
from gradent.kernels.strategy import Product, Strategy, decide
from gradent.planning.cost import CostSetting, plan_lines
from gradent.planning.trace import ParameterUse


class Tapped:
    """As much of a tap as the collector looks at."""

    def __init__(self, use: MatrixUse) -> None:
        self.use, self.node = use, None


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
sides = st.integers(1, 40)


def arrive(
    wanted: Wanted, out: int, inp: int, seed: int, dtype: torch.dtype, *, factors: bool
) -> tuple[Arrival, Tensor]:
    """One forward of all rows, ragged, and their gradients `[N, O, I]` float64."""
    draw = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 30, (), generator=draw))
    stops = torch.randint(1, length + 1, (wanted.rows,), generator=draw).tolist()
    u, v = (torch.randn(wanted.rows, length, size, generator=draw, dtype=torch.float64) for size in (out, inp))
    for row, stop in enumerate(stops):
        u[row, stop:] = 0
    u, v = u.to(dtype), v.to(dtype)
    layout = Layout(wanted.rows, length, lambda: [(0, stop) for stop in stops])
    powers = [2.0 ** (row % 3 - 1) for row in range(wanted.rows)] if factors else None
    node = SimpleNamespace(given=None)
    use = MatrixUse(View(0, (), (out, inp)), v, swapped=False)
    grads = u.double().mT @ v.double()
    if powers is not None:
        grads = grads * torch.tensor(powers, dtype=torch.float64)[:, None, None]
    return Arrival(use, u, Place(layout, range(wanted.rows)), powers, node), grads


def true_entries(
    wanted: Wanted, grads: Tensor, weight: Tensor | None, directions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Entries `[M]` and what an error of each is scaled by."""
    along = torch.zeros(0, *grads.shape[1:], dtype=torch.float64) if directions is None else directions
    flat = torch.cat([grads, along])
    flat = (flat if weight is None else flat * weight).flatten(1)
    left, right = wanted.places
    norms = flat.norm(dim=1)
    return (flat[left] * flat[right]).sum(1), (norms[left] * norms[right]).clamp_min(1e-300)


@pytest.mark.parametrize("name", REDUCERS)
@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes,
    out=sides,
    inp=sides,
    seed=st.integers(0, 10**6),
    budget=st.sampled_from([2**10, 2**14, 2**22]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    weighted=st.booleans(),
    directed=st.booleans(),
    scaled=st.booleans(),
)
def test_every_reducer(
    name: Any, sizes: list[int], out: int, inp: int, seed: int, budget: int, dtype: torch.dtype, weighted: bool,
    directed: bool, scaled: bool,
) -> None:  # fmt: skip
    is_reused = name == "weight_grad_reuse"
    wanted = Wanted.sizes(sizes, 2 if directed and not is_reused else 0)
    arrival, grads = arrive(wanted, out, inp, seed, dtype, factors=scaled or is_reused)
    draw = torch.Generator().manual_seed(seed + 1)
    weight = torch.rand(out, inp, generator=draw, dtype=torch.float64) + 0.1 if weighted else None
    directions = torch.randn(2, out, inp, generator=draw, dtype=torch.float64) if wanted.directions else None
    ledger = Ledger(
        wanted,
        budget=budget,
        weight=None if weight is None else lambda param: weight,
        directions=None if directions is None else lambda param: directions,
    )
    strategy = Strategy(reducer=name, tile=(out, inp), scratch=budget, rows=wanted.rows, why="a test")
    if not REDUCERS[name](ledger, arrival, strategy):
        assert name != "weight_grad_reuse"
        ledger.finish(0)
        ledger.close()
    entries, scale = true_entries(wanted, grads, weight, directions)
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    assert float(((ledger.entries[0] - entries).abs() / scale).max()) <= limit
    if is_reused:
        source, _, total = arrival.node.given  # type: ignore[attr-defined]
        assert source is arrival.grad_output
        assert arrival.factors is not None
        true = (grads / torch.tensor(arrival.factors, dtype=torch.float64)[:, None, None]).sum(0)
        assert float((total - true).norm() / true.norm().clamp_min(1e-300)) <= max(
            limit, 1e-5 * (dtype != torch.float64)
        )


def test_the_check_can_fail() -> None:
    wanted = Wanted.sizes([2, 3])
    arrival, grads = arrive(wanted, 5, 7, 0, torch.float64, factors=False)
    ledger = Ledger(wanted, budget=2**20)
    REDUCERS["group_by_group"](ledger, arrival, decide(Product(rows=5, lengths=(3,) * 3, out=5, inp=7), 2**20))
    ledger.finish(0)
    entries, scale = true_entries(wanted, grads[[1, 0, 2, 3, 4]], None, None)
    assert float(((ledger.entries[0] - entries).abs() / scale).max()) > 1e-3


@settings(max_examples=80, deadline=None)
@given(
    group=st.integers(1, 4),
    together=st.integers(1, 4),
    tokens=st.integers(1, 60),
    out=st.integers(1, 200),
    inp=st.integers(1, 200),
    budget=st.integers(12, 24).map(lambda power: 2**power),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    shares=st.booleans(),
)
def test_the_plan_is_what_is_done(
    group: int, together: int, tokens: int, out: int, inp: int, budget: int, dtype: torch.dtype, shares: bool
) -> None:
    """`gradent plan` and the collector ask `decide` the same, whether rows share a forward or not."""
    wanted = Wanted.sizes([group] * together)
    shares = shares or wanted.rows == 1
    setting = CostSetting(
        tokens=tokens, groups=together, together=together, group=group, rows=wanted.rows if shares else 1, dtype=dtype,
        budget=budget,
    )  # fmt: skip
    (line,) = plan_lines([ParameterUse(parameter="w", kind="matrix", shape=(out, inp))], setting)
    said: list[Strategy] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "decide", lambda *given: said.append(decide(*given)) or said[-1])
        collector = Collector(Ledger(wanted, budget=budget), budget)
        forwards = [range(wanted.rows)] if shares else [[row] for row in range(wanted.rows)]
        taps = []
        for rows in forwards:
            use = MatrixUse(View(0, (), (out, inp)), torch.randn(len(rows), tokens, inp).to(dtype), swapped=False)
            taps.append((Tapped(use), Place(Layout(len(rows), tokens), rows)))
            collector.expect(*taps[-1])  # type: ignore[arg-type]
        for tap, place in taps:
            collector.arrive(tap, torch.randn(len(place.rows), tokens, out).to(dtype), place)  # type: ignore[arg-type]
        collector.ledger.close()
    assert said[0] == line.strategy
    if line.strategy is not None and line.strategy.reducer == "queue":
        assert said == [line.strategy] * len(said) or replace(said[-1], why="") == replace(line.strategy, why="")
