"""What a step does to a pair that is not in it: the leave-one-out estimate, and when it is given."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gradent import EntanglementCallback, PairBatch
from gradent.attribution.likelihood import estimate_nll, needed_weight
from gradent.attribution.step import StepAttribution
from gradent.attribution.unseen import estimate_unseen
from gradent.record import MOVED_SOURCES
from gradent.trainer.callback.unseen import UnseenPairs
from gradent.trainer.records.step import StepRecord, summarize
from tests.trainer.runs import data_for, llama, make_trainer

PAIRS = 5


def account(seed: int = 0, pairs: int = PAIRS) -> StepAttribution:
    """An account whose sources fit its pushes."""
    draw = torch.Generator().manual_seed(seed)
    pushes = torch.randn(2 * pairs, 2 * pairs, dtype=torch.float64, generator=draw)
    side = torch.arange(2 * pairs) < pairs
    pair = torch.arange(2 * pairs) % pairs
    others = pair[:, None] != pair
    own = pushes.diagonal().clone()
    moved = {name: torch.zeros(2 * pairs, dtype=torch.float64) for name in MOVED_SOURCES}
    moved |= {
        "own": own, "partner": (pushes * ~others).sum(1) - own,
        "others_chosen": (pushes * others * side).sum(1), "others_rejected": (pushes * others * ~side).sum(1),
        "momentum": torch.randn(2 * pairs, dtype=torch.float64, generator=draw),
        "weight_decay": torch.randn(2 * pairs, dtype=torch.float64, generator=draw),
    }  # fmt: skip
    return StepAttribution(products=pushes, pushes=pushes, moved=moved)


def test_each_response_is_looked_at_without_its_own_pair() -> None:
    found = account()
    estimate = estimate_unseen(found)
    assert estimate is not None
    for side in (0, 1):
        looks = []
        for pair in range(PAIRS):
            row = side * PAIRS + pair
            kept = [other for other in range(2 * PAIRS) if other % PAIRS != pair]
            pushed = float(found.pushes[row, kept].sum()) * PAIRS / (PAIRS - 1)
            looks.append(pushed + float(found.moved["momentum"][row] + found.moved["weight_decay"][row]))
        values = torch.tensor(looks, dtype=torch.float64)
        assert estimate[side].tolist() == pytest.approx([float(values.mean()), float(values.std()) / PAIRS**0.5])


def test_without_the_whole_step_or_its_sources_there_is_none() -> None:
    found = account()
    assert estimate_unseen(replace(found, is_whole=False)) is None
    assert estimate_unseen(replace(found, moved={"step": found.total})) is None
    assert estimate_unseen(account(pairs=1)) is None


def test_rows_alike_are_estimated_without_bias() -> None:
    """Where every pair of a population may be drawn, the mean estimate is what a batch does to one more pair."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, 400, 6, dtype=torch.float64, generator=draw) + torch.tensor([0.3, 0, 0, 0, 0, 0])
    estimates, truths = [], []
    for _ in range(300):
        chosen = torch.randperm(400, generator=draw)
        inside, outside = chosen[:PAIRS], chosen[PAIRS:]
        rows = features[:, inside].reshape(2 * PAIRS, -1)
        signs = torch.tensor([1.0] * PAIRS + [-1.0] * PAIRS, dtype=torch.float64) / PAIRS
        pushes = rows @ rows.T * signs
        pair = torch.arange(2 * PAIRS) % PAIRS
        others = (pushes * (pair[:, None] != pair)).sum(1)
        moved = {name: torch.zeros(2 * PAIRS, dtype=torch.float64) for name in MOVED_SOURCES}
        found = StepAttribution(products=pushes, pushes=pushes, moved=moved | {"others_chosen": others})
        estimate = estimate_unseen(found)
        assert estimate is not None
        estimates.append(estimate[:, 0])
        truths.append((features[:, outside] @ (rows * signs[:, None]).sum(0)).mean(1))
    bias = torch.stack(estimates) - torch.stack(truths)
    assert bool((bias.mean(0).abs() < 3 * bias.std(0) / 300**0.5).all())


def batch(prompts: list[int]) -> PairBatch:
    return PairBatch.from_tokens([([1, prompt], [7], [8, 9]) for prompt in prompts])


def record(step: int, prompts: list[int]) -> StepRecord:
    made = object.__new__(StepRecord)
    found = account(pairs=len(prompts))
    for name, value in {"step": step, "batch": batch(prompts), "attribution": found}.items():
        object.__setattr__(made, name, value)
    return made


def test_it_is_given_from_step_10_on_in_the_first_epoch_of_pairs_that_are_new() -> None:
    said: list[str] = []
    unseen = UnseenPairs(said.append)
    assert unseen.estimate(record(9, [2, 3]), 0.1) is None
    assert unseen.estimate(record(10, [4, 5]), 0.2) is not None
    assert unseen.estimate(record(11, [6, 7]), 1.0) is not None and not said
    assert unseen.estimate(record(12, [8, 9]), 1.1) is None
    assert len(said) == 1 and "second epoch" in said[0]


@pytest.mark.parametrize("again", [[20, 20], [20, 4]])
def test_prompts_that_come_again_end_it(again) -> None:
    said: list[str] = []
    unseen = UnseenPairs(said.append)
    assert unseen.estimate(record(10, [4, 5]), 0.1) is not None
    assert unseen.estimate(record(11, again), 0.2) is None
    assert unseen.estimate(record(12, [30, 31]), 0.3) is None
    assert len({*said}) == 1 and "share prompts" in said[0]


def test_a_run_logs_it_with_its_error(tiny_tokenizer, tmp_path) -> None:
    callback = EntanglementCallback(every=1, alert=None, on_error="raise")
    options = {"data": data_for("dpo", 48), "max_steps": 12, "learning_rate": 1e-4}
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback], **options)
    trainer.train()
    logged = {row["step"]: row for row in trainer.state.log_history if "gradent/coverage" in row}
    assert [step for step, row in logged.items() if "gradent/unseen/chosen" in row] == [10, 11, 12]
    for kept in list(callback.records)[9:]:
        assert kept.attribution is not None and kept.unseen is not None
        estimate = estimate_unseen(kept.attribution)
        assert estimate is not None and torch.equal(kept.unseen, estimate)
        row = logged[kept.step]
        names = [f"gradent/unseen/{name}" for name in ("chosen", "chosen_error", "rejected", "rejected_error")]
        assert [row[name] for name in names] == pytest.approx(estimate.flatten().tolist())
        nll = estimate_nll(kept.attribution, kept.verdict.d_w, kept.gram.chosen_len)
        assert nll is not None and kept.nll is not None and torch.equal(kept.nll.gain, nll.gain)
        assert torch.allclose(nll.change[1], estimate[:, 0])
        for name in ("batch", "unseen"):
            found = [row.get(f"gradent/nll_weight/{name}{end}", math.nan) for end in ("", "_error")]
            assert found == pytest.approx(needed_weight([nll], unseen=name == "unseen"), nan_ok=True)
        assert nll.error[1] == pytest.approx(float(estimate[0, 1]))
    assert all(kept.nll is None for kept in list(callback.records)[:9])
    both = summarize(list(callback.records)[10:])
    errors = [float(kept.unseen[0, 1]) for kept in list(callback.records)[10:] if kept.unseen is not None]
    assert both["gradent/unseen/chosen_error"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)


def test_nothing_is_said_where_it_would_not_have_been_given() -> None:
    said: list[str] = []
    unseen = UnseenPairs(said.append)
    for step in (1, 2, 9):
        assert unseen.estimate(record(step, [4, 4]), 0.1) is None
    unsplit = record(10, [4, 4])
    assert unsplit.attribution is not None
    object.__setattr__(unsplit, "attribution", replace(unsplit.attribution, is_whole=False))
    assert unseen.estimate(unsplit, 0.2) is None and not said
    assert unseen.estimate(record(11, [6, 7]), 0.2) is None
    assert len({*said}) == 1 and "share prompts" in said[0]
