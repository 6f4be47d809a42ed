"""Rows of several backwards that meet by sketches: against accounts whose rows were kept, and float64 autograd."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradent import PairBatch, attach
from gradent.attribution import step_accounts
from gradent.attribution.across import join_ranks
from gradent.attribution.step import StepAttribution
from gradent.errors import InputError
from gradent.hooks.piggyback.config import LEAST_WIDTH, MOST_WIDTH, RowStore
from gradent.kernels.common.sketch import GradientSketch, WeighedSketchSums, folded
from tests.attribution.brute_force import Frozen
from tests.attribution.test_step import MODELS, SMALL, split_groups, warm
from tests.batches import ragged, uneven
from tests.trainer_steps import dpo, through_logits

PARTS = [ragged(3), uneven(), ragged(2)]
BUDGETS = {"tied": (1_500_000, 0.02), "untied": (1_500_000, 0.02), "LoRA": (800_000, 0.03)}
"""Budgets in which the rows have no room and sketches do, of 4096 numbers or of 2048, and their largest error."""

ERRORS = 5
"""How many standard errors an estimate may be off."""


def third(chosen: Tensor, rejected: Tensor) -> Tensor:
    return dpo(chosen, rejected) / 3


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [part for part in model.parameters() if part.requires_grad]


def run(
    kind: str, budget: int | None, parts: list[PairBatch], *, groups: Any = trainable, accumulation: int = 3,
    lr: float | None = None, **options: Any,
) -> tuple[StepAttribution, Frozen, float]:  # fmt: skip
    """The account of one step, the model before it, and what clipping leaves."""
    model = MODELS[kind]()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-3, **options)
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer, memory_budget=budget, accumulation=accumulation) as recorder:
        for part in parts:
            through_logits(model, part, third).backward()
            recorder.collect()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        found = recorder.harvest(scale=3, lr=lr)
    assert found is not None
    assert found.attribution is not None
    return found.attribution, frozen, 0.05 / (float(norm) + 1e-6)


def split(parts: list[PairBatch]) -> Tensor:
    """Which backward each row comes from, chosen rows first, int64 `[N]`."""
    side = torch.tensor([number for number, part in enumerate(parts) for _ in range(len(part))])
    return torch.cat([side, side])


def coefficients(frozen: Frozen, parts: list[PairBatch]) -> Tensor:
    """c of all rows, chosen rows first, `[N]`."""
    halves = [frozen.coefficients(part, third).chunk(2) for part in parts]
    return torch.cat([sides[place] for place in (0, 1) for sides in halves])


def sizes(exact: StepAttribution, c: Tensor) -> Tensor:
    """The size that every push could have, `[N, N]`: by the rows' norms in the metric that learning rates weigh."""
    norms = (exact.pushes.diagonal() / c).abs().sqrt()
    return norms[:, None] * norms * c.abs()


@pytest.mark.parametrize("kind", MODELS)
def test_all_micro_batches_are_in(kind: str) -> None:
    budget, most = BUDGETS[kind]
    exact, frozen, kept = run(kind, None, PARTS)
    found, _, _ = run(kind, budget, PARTS)
    assert exact.is_whole and exact.sketch_error is None
    assert found.is_whole and found.sketch is None
    assert found.sketch_error is not None
    assert 0 < found.sketch_error <= most
    batches = split(PARTS)
    apart = batches[:, None] != batches
    # Products and pushes against autograd: exact within a backward, a few errors off between two.
    gradients = [frozen.row_gradients(part).chunk(2) for part in PARTS]
    c = coefficients(frozen, PARTS)
    grads = torch.cat([halves[side] for side in (0, 1) for halves in gradients])
    products = (grads * frozen.metric) @ grads.T
    pushes = -((grads * (frozen.lr * frozen.metric * frozen.fresh * kept)) @ grads.T) * c
    roots = products.diagonal().sqrt()
    errors = (found.products - products).abs() / (roots[:, None] * roots)
    assert float(errors[~apart].max()) <= 1e-5
    assert 0 < float(errors[apart].max()) <= ERRORS * found.sketch_error
    assert float(((found.pushes - pushes).abs() / sizes(exact, c)).max()) <= ERRORS * found.sketch_error
    # Sources: pushes add up to them, and the total is as near as its sketched part lets it be.
    pairs = sum(map(len, PARTS))
    pushed = found.pushes.sum(1)
    others = sum(found.moved[source] for source in ("own", "partner", "others_chosen", "others_rejected"))
    assert float((pushed - others).abs().max() / pushed.abs().max()) <= 1e-9
    missing = (sizes(exact, c) * (batches[:, None] < batches)).square().sum(1).sqrt()
    error = (found.total - exact.total).abs()
    assert bool((error <= ERRORS * found.sketch_error * missing + 1e-5 * exact.total.abs().max()).all())
    assert bool((batches[error > 1e-5 * float(exact.total.abs().max())] < 2).all()), "the last one knows all before it"
    assert float(found.moved["earlier_batches"][batches == 0].abs().max()) == 0
    for source in ("momentum", "weight_decay", "own", "partner"):
        close = float((found.moved[source] - exact.moved[source]).abs().max() / exact.total.abs().max())
        assert close <= 1e-5, source
    # Without, later micro-batches are missing.
    without, _, _ = run(kind, SMALL, PARTS)
    assert not without.is_whole and without.sketch_error is None
    assert bool(without.pushes[0, len(PARTS[0]) : pairs].isnan().all())
    assert float(error.norm()) <= 0.3 * float((without.total - exact.total).norm())


def test_parameter_groups_with_learning_rates_of_their_own() -> None:
    exact, frozen, _ = run("untied", None, PARTS, groups=split_groups)
    found, _, _ = run("untied", BUDGETS["untied"][0], PARTS, groups=split_groups)
    assert found.is_whole
    assert found.sketch_error is not None
    off = (found.pushes - exact.pushes).abs() / sizes(exact, coefficients(frozen, PARTS))
    assert float(off.max()) <= ERRORS * found.sketch_error
    roots = exact.products.diagonal().sqrt()
    assert float(((found.products - exact.products).abs() / (roots[:, None] * roots)).max()) < 0.1


def test_a_learning_rate_that_is_set_later(caplog: pytest.LogCaptureFixture) -> None:
    budget = BUDGETS["untied"][0]
    once, _, _ = run("untied", budget, PARTS)
    twice, _, _ = run("untied", budget, PARTS, lr=2e-3)
    torch.testing.assert_close(twice.pushes, 2 * once.pushes, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(twice.products, once.products)
    with caplog.at_level(logging.WARNING, "gradent"):
        other, _, _ = run("untied", budget, PARTS, groups=split_groups, lr=2e-3)
    assert not other.is_whole and other.sketch_error is None
    assert "learning rates have changed since the backward" in caplog.text


def test_rows_of_pairs_that_are_left_out_push_too() -> None:
    same = ragged(2)
    for part in (same.input_ids, same.attention_mask, same.completion_mask):
        part[2] = part[0]  # of pair 0, rejected is now chosen
    parts = [same, ragged(3), uneven()]
    exact, _, _ = run("untied", None, parts)
    found, _, _ = run("untied", BUDGETS["untied"][0] // 2, parts)
    assert len(found.products) == len(exact.products) == 2 * (1 + 3 + 4)
    assert found.is_whole
    assert float((found.total - exact.total).norm() / exact.total.norm()) < 0.02


def test_one_backward_of_several_is_whole_and_more_than_expected_are_not() -> None:
    budget = BUDGETS["untied"][0]
    one, _, _ = run("untied", budget // 2, [ragged(3)])
    assert one.is_whole and one.sketch_error is not None
    more, _, _ = run("untied", budget // 2, PARTS, accumulation=2)
    assert not more.is_whole and more.sketch_error is None
    none, _, _ = run("untied", SMALL, PARTS, accumulation=1)
    assert not none.is_whole and none.sketch_error is None


def run_rank(monkeypatch: pytest.MonkeyPatch, part: PairBatch, budget: int) -> StepAttribution:
    """The account of one of two ranks."""
    monkeypatch.setattr(step_accounts, "world_size", lambda: 2)
    model = MODELS["untied"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm(model, optimizer)
    with attach(model, optimizer=optimizer, memory_budget=budget) as watching:
        through_logits(model, part).backward()
        found = watching.harvest()
    assert found is not None
    assert found.attribution is not None
    return found.attribution


def test_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [ragged(3), uneven()]
    model = MODELS["untied"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm(model, optimizer)
    c = coefficients(Frozen(model, optimizer), parts)
    with attach(model, optimizer=optimizer) as watching:
        for part in parts:
            through_logits(model, part, lambda *logps: dpo(*logps) / 2).backward()
        recording = watching.harvest()
    assert recording is not None
    exact = recording.attribution
    assert exact is not None
    # Of different widths, too: 4096 numbers and 2048.
    ranks = [run_rank(monkeypatch, part, budget) for part, budget in zip(parts, (1_000_000, 500_000), strict=True)]
    assert all(rank.sketch is not None and not rank.is_whole for rank in ranks)
    assert [rank.sketch.vectors.shape[1] for rank in ranks if rank.sketch] == [4096, 2048]
    joined = join_ranks(ranks)
    assert joined.is_whole and joined.sketch is None
    assert joined.sketch_error is not None
    off = (joined.pushes - exact.pushes).abs() / sizes(exact, c)
    assert float(off.max()) <= ERRORS * joined.sketch_error
    ranks_of = split(parts)
    missing = (sizes(exact, c) * (ranks_of[:, None] != ranks_of)).square().sum(1).sqrt()
    error = (joined.total - exact.total).abs()
    assert bool((error <= ERRORS * joined.sketch_error * missing).all())
    assert float(joined.moved["earlier_batches"].abs().max()) == 0
    alone, half = join_ranks(ranks[:1]), join_ranks([ranks[0], replace(ranks[1], sketch=None)])
    assert ranks[1].sketch is not None
    other = join_ranks([ranks[0], replace(ranks[1], sketch=replace(ranks[1].sketch, seed=9))])
    for partial in (alone, half, other):  # a rank has failed, had no room, or is at another step
        assert not partial.is_whole and partial.sketch is None
    torch.testing.assert_close(half.total[:3], ranks[0].total[:3])
    assert bool(half.pushes[0, 3:7].isnan().all())


@pytest.mark.parametrize("accumulation", [0, 1.5, "2"])
def test_refusals(accumulation: Any) -> None:
    with pytest.raises(InputError, match="accumulation"):
        attach(nn.Linear(2, 2), accumulation=accumulation)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_memory_that_runs_out_counts_nothing_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = BUDGETS[kind][0]
    want, frozen, _ = run(kind, budget, PARTS)
    true, calls = WeighedSketchSums._take_weighed, 0  # noqa: SLF001  (no public name)

    def scarce(sums: WeighedSketchSums, rows: Tensor, place: Any) -> None:
        nonlocal calls
        calls += 1
        true(sums, rows, place)
        if calls % 5 == 0:  # once the tile is in, and never twice for one parameter
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(WeighedSketchSums, "_take_weighed", scarce)
    found, _, _ = run(kind, budget, PARTS)
    assert calls > 20
    assert float(((found.pushes - want.pushes).abs() / sizes(want, coefficients(frozen, PARTS))).max()) <= 1e-5
    assert found.sketch_error == pytest.approx(want.sketch_error, rel=1e-3)


def test_room_for_sketches() -> None:
    def width(budget: int, *, backwards: int = 3, ranks: int = 1, numbers: int = 10**9) -> int:
        store = RowStore(budget, backwards=backwards, ranks=ranks)
        assert not store.reserve(budget // 2)
        return store.sketch_width(16, numbers)

    least = 16 * 4 * 4 * LEAST_WIDTH  # of three backwards, and of a parameter's part
    assert [width(least - 1), width(least), width(2 * least - 1), width(2 * least)] == [0, 1024, 1024, 2048]
    assert width(2**40) == MOST_WIDTH
    assert width(2**40, numbers=3000) == 2048
    assert width(2**22, ranks=2) == width(2**22, backwards=6)
    kept = RowStore(300, backwards=3)
    assert [kept.reserve(100) for _ in range(4)] == [True, True, True, False]


def test_another_seed_is_another_draw() -> None:
    shapes, places = [torch.Size([50, 100])], torch.arange(5000)
    buckets = [GradientSketch(shapes, 1024, seed=seed).hashed(places)[0] for seed in (0, 1, 2**20 + 1)]
    assert float((buckets[0] == buckets[1]).double().mean()) < 0.01
    assert torch.equal(buckets[1], buckets[2])


def test_sketches_fold_into_narrower_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, shapes = torch.randn(3, 5000, generator=draw), [torch.Size([50, 100])]
    wide, narrow = (torch.zeros(3, width) for width in (2048, 512))
    for vectors in (wide, narrow):
        GradientSketch(shapes, vectors.shape[1]).add(vectors, torch.arange(5000), rows, room=0)
    torch.testing.assert_close(folded(wide, 512), narrow)
