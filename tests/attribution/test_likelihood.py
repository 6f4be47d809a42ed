"""The likelihood term that would have been enough: against autograd, and by real steps with that term in the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gradent import PairBatch, attach
from gradent.attribution.likelihood import NLLEffect, estimate_nll, needed_weight
from gradent.attribution.update_rule import UpdateRule
from gradent.recorder.recording import Recording
from tests.attribution.brute_force import Frozen, flat
from tests.attribution.test_step import MODELS, OPTIMIZERS, SMALL, split_groups, warm
from tests.batches import ragged
from tests.trainer_steps import Loss, dpo, through_logits

LR = 1e-6
PAIRS = 3


def with_term(loss: Loss, weight: float, batch: PairBatch) -> Loss:
    """A loss with TRL's NLL term: the mean over all chosen tokens."""
    tokens = sum(int(batch.row(pair)[1].sum()) for pair in range(len(batch)))
    return lambda chosen, rejected: loss(chosen, rejected) - weight * chosen.sum() / tokens


def falling(chosen: Tensor, rejected: Tensor) -> Tensor:
    """A loss under which chosen falls: it is lowered on purpose."""
    return (chosen - rejected / 3).mean()


def effect_of(found: Recording | None) -> NLLEffect:
    assert found is not None
    assert found.attribution is not None
    effect = estimate_nll(found.attribution, found.d_w, found.gram.chosen_len)
    assert effect is not None
    return effect


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("budget", [SMALL, None])
@pytest.mark.parametrize("name", ["SGD", "momentum", "AdamW", "amsgrad"])
def test_what_a_term_adds_is_what_autograd_says(name: str, budget: int | None, kind: str) -> None:
    model, batch = MODELS[kind](), ragged(PAIRS)
    optimizer = OPTIMIZERS[name](split_groups(model))
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer, memory_budget=budget) as recorder:
        through_logits(model, batch).backward()
        effect = effect_of(recorder.harvest())
    rows = frozen.row_gradients(batch)
    tokens = sum(int(batch.row(pair)[1].sum()) for pair in range(PAIRS))
    scaled = rows * frozen.lr * frozen.metric * frozen.fresh
    added = scaled @ rows[:PAIRS].T / tokens  # what each chosen row's part of the term does to each row
    scale = float(added.abs().max())
    torch.testing.assert_close(effect.gain[0], added.sum(1).view(2, -1).mean(1), rtol=0, atol=1e-5 * scale)
    others = added * ~torch.eye(PAIRS, dtype=torch.bool).repeat(2, 1)
    want = others.sum(1).view(2, -1).mean(1) * PAIRS / (PAIRS - 1)
    torch.testing.assert_close(effect.gain[1], want, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["SGD", "momentum"])
def test_a_real_step_with_the_term_leaves_chosen_where_it_is(name: str, kind: str) -> None:
    batch, ends, needed = ragged(PAIRS), [], 0.0
    for weight in (None, 0.0):
        torch.manual_seed(0)
        model = MODELS[kind]()
        optimizer = OPTIMIZERS[name](split_groups(model))
        warm(model, optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= LR
        for state in optimizer.state.values():  # momentum that lowers chosen
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].neg_().mul_(3)
        frozen = Frozen(model, optimizer)
        loss = falling if name == "SGD" else dpo
        if weight is None:
            with attach(model, optimizer=optimizer) as recorder:
                through_logits(model, batch, loss).backward()
                effect = effect_of(recorder.harvest())
            needed, _ = needed_weight([effect], unseen=False, throughout=False)
            assert needed > 0
        else:
            through_logits(model, batch, with_term(loss, needed, batch)).backward()
        optimizer.step()
        step = flat([part for part in model.parameters() if part.requires_grad]) - frozen.theta
        ends.append((frozen.row_gradients(batch)[:PAIRS] @ step).mean())
    without, level = ends
    assert without < 0
    assert abs(float(level)) <= 1e-5 * abs(float(without)) + 1e-12


def test_adam_with_the_term_leaves_chosen_where_it_is() -> None:
    model, batch = MODELS["untied"](), ragged(PAIRS)
    optimizer = OPTIMIZERS["AdamW"](split_groups(model))
    warm(model, optimizer)
    for state in optimizer.state.values():
        state["exp_avg"].neg_().mul_(3)
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer) as recorder:
        through_logits(model, batch).backward()
        effect = effect_of(recorder.harvest())
    needed, _ = needed_weight([effect], unseen=False, throughout=False)
    assert needed > 0
    _, moved = frozen.account(batch, with_term(dpo, needed, batch), 1.0)
    total = torch.stack(list(moved.values())).sum(0)[:PAIRS]
    assert abs(float(total.mean())) <= 1e-5 * float(torch.stack([part.abs() for part in moved.values()]).max())
    assert float(effect.change[0, 0]) < 0


@pytest.mark.parametrize("name", ["momentum", "AdamW"])
def test_a_term_that_lasts_acts_through_momentum_too(name: str) -> None:
    """Of a gradient that is the same in every step, the steps grow to `lasting` times what they are without."""
    part = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model = torch.nn.ParameterDict({"part": part})
    optimizer = OPTIMIZERS[name]([{"params": [part], "weight_decay": 0.0}])
    for _ in range(300):
        part.grad = torch.ones_like(part)
        terms = UpdateRule(optimizer, dict(model.named_parameters())).terms(0)
        before = part.detach().clone()
        optimizer.step()
    step = float((before - part.detach())[0]) / terms.lr
    assert step == pytest.approx(terms.fresh * terms.lasting, rel=1e-6)


def test_a_window_sums_its_steps() -> None:
    change = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]], dtype=torch.float64)
    gain = torch.tensor([[2.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    first = NLLEffect(fresh=change / 4, carried=change * 3 / 4, gain=gain, error=torch.tensor([0.3, 0.4]), lasting=10.0)
    second = replace(first, fresh=-change / 3, carried=torch.zeros_like(change))
    assert needed_weight([first, second], unseen=True) == pytest.approx((2 / 80, 0.4 * 2**0.5 / 80))
    assert needed_weight([first], unseen=False, throughout=False) == pytest.approx((0.5, 0.15))
    assert needed_weight([second], unseen=True) == pytest.approx((0.0, 0.01))
    assert math.isnan(needed_weight([replace(first, gain=-gain)], unseen=True)[0])
    assert math.isnan(needed_weight([first.without_unseen()], unseen=True)[0])
    assert needed_weight([first.without_unseen()], unseen=False, throughout=False)[0] == pytest.approx(0.5)
