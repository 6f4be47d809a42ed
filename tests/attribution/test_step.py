"""The account of a step in loops written by hand, against float64 autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gradent import PairBatch, attach
from gradent.attribution.step import StepAttribution
from gradent.record import MOVED_SOURCES as SOURCES
from tests.adapters import lora_everywhere
from tests.attribution.brute_force import Frozen, Sources, flat
from tests.batches import ragged, uneven
from tests.trainer_steps import dpo, through_fused_head, through_logits, with_fused_head
from tests.zoo import build

MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: build("gpt2"), "untied": lambda: build("llama"), "LoRA": lambda: lora_everywhere("llama"),
}  # fmt: skip

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, weight_decay=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-3, weight_decay=0.1),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True, foreach=True),
}
SMALL = 2**16
"""A budget in which no rows' gradients have room: they are reduced as they come. By default, these models' are kept."""

TOLERANCE = 1e-5
"""Largest error, scaled by the largest part of any row."""


def split_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups with learning rates of their own."""
    parts = [part for part in model.parameters() if part.requires_grad]
    return [{"params": parts[::2]}, {"params": parts[1::2], "lr": 3e-3, "weight_decay": 0.02}]


def warm(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Some steps, after which every element that the tests' batches move has a second moment."""
    for batch in [ragged(3), uneven()] * steps:
        through_logits(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def check(found: StepAttribution | None, products: torch.Tensor, moved: Sources, frozen: Frozen) -> None:
    assert found is not None
    assert tuple(found.moved) == SOURCES
    scale = products.diagonal().sqrt()
    assert float(((found.products - products) / (scale[:, None] * scale)).abs().max()) <= TOLERANCE
    largest = torch.stack([part.abs() for part in moved.values()]).amax()
    for source in SOURCES:
        error = float((found.moved[source] - moved[source]).abs().max() / largest)
        assert error <= TOLERANCE, (source, error)
    total = torch.stack(list(moved.values())).sum(0)
    assert float((found.total - total).abs().max() / largest) <= TOLERANCE


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("name", "budget"), [(name, SMALL) for name in OPTIMIZERS] + [("AdamW", None), ("SGD", None)])
def test_every_source_is_what_autograd_says(name: str, budget: int | None, kind: str) -> None:
    model, batch = MODELS[kind](), ragged(3)
    optimizer = OPTIMIZERS[name](split_groups(model))
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer, memory_budget=budget) as recorder:
        through_logits(model, batch).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        found = recorder.harvest()
    assert norm > 0.05
    assert found is not None
    check(found.attribution, *frozen.account(batch, dpo, 0.05 / (float(norm) + 1e-6)), frozen)


@pytest.mark.parametrize("kind", MODELS)
def test_the_step_that_follows_is_the_one_that_was_accounted_for(kind: str) -> None:
    model, batch = MODELS[kind](), ragged(3)
    optimizer = torch.optim.SGD(split_groups(model), lr=1e-2, momentum=0.9, weight_decay=0.1)
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer) as recorder:
        through_logits(model, batch).backward()
        found = recorder.harvest()
    optimizer.step()
    step = flat([part for part in model.parameters() if part.requires_grad]) - frozen.theta
    want = frozen.row_gradients(batch) @ step
    assert found is not None
    assert found.attribution is not None
    torch.testing.assert_close(found.attribution.total, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_micro_batches_that_came_before_are_a_source() -> None:
    model, parts = build("llama"), [ragged(2), uneven()]
    optimizer = torch.optim.AdamW(split_groups(model), lr=1e-3)
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)

    def half(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return dpo(chosen, rejected) / 2

    before, wants = None, []
    with attach(model, optimizer=optimizer, memory_budget=SMALL) as recorder:
        for part in parts:
            through_logits(model, part, half).backward()
            recorder.collect()
            wants.append(frozen.account(part, half, 1.0, before))
            before = flat([weight.grad for weight in model.parameters() if weight.grad is not None])
        found = recorder.harvest(scale=2)
    assert found is not None
    account = found.attribution
    assert account is not None
    counts = [len(part) for part in parts]
    pairs = sum(counts)
    start = 0
    for (products, moved), count in zip(wants, counts, strict=True):
        rows = torch.cat([torch.arange(count) + start, torch.arange(count) + pairs + start])
        got = StepAttribution(
            products=account.products[rows][:, rows], pushes=account.pushes[rows][:, rows],
            moved={source: part[rows] for source, part in account.moved.items()},
        )  # fmt: skip
        check(got, products, moved, frozen)
        start += count
    assert bool(account.products[0, counts[0] :][: counts[1]].isnan().all())


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_all_micro_batches_meet_where_their_gradients_are_kept(kind: str) -> None:
    model, parts = MODELS[kind](), [ragged(2), uneven()]
    optimizer = torch.optim.AdamW(split_groups(model), lr=1e-3)
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)

    def half(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return dpo(chosen, rejected) / 2

    with attach(model, optimizer=optimizer) as recorder:
        for part in parts:
            through_logits(model, part, half).backward()
            recorder.collect()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        found = recorder.harvest(scale=2)
    kept = 0.05 / (float(norm) + 1e-6)
    gradients = [frozen.row_gradients(part).chunk(2) for part in parts]
    c = [frozen.coefficients(part, half).chunk(2) for part in parts]
    grads, weights = (torch.cat([side[place] for place in (0, 1) for side in sides]) for sides in (gradients, c))
    products = (grads * frozen.metric) @ grads.T
    pushes = -((grads * (frozen.lr * frozen.metric * frozen.fresh * kept)) @ grads.T) * weights
    assert found is not None
    account = found.attribution
    assert account is not None
    scale = products.diagonal().sqrt()
    assert float(((account.products - products) / (scale[:, None] * scale)).abs().max()) <= TOLERANCE
    assert float((account.pushes - pushes).abs().max() / pushes.abs().max()) <= TOLERANCE
    assert float(account.moved["earlier_batches"].abs().max() / pushes.abs().max()) <= TOLERANCE
    others = pushes[0].sum() - pushes[0, 0] - pushes[0, len(pushes) // 2]
    got = account.moved["others_chosen"][0] + account.moved["others_rejected"][0]
    assert abs(float(got - others)) <= TOLERANCE * float(pushes.abs().max())


@pytest.mark.parametrize("name", ["momentum", "Adam", "AdamW", "amsgrad"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_pass_of_its_own_accounts_for_the_step_itself(name: str, steps: int) -> None:
    model, batch = MODELS["tied"](), ragged(3)
    optimizer = OPTIMIZERS[name](split_groups(model))
    warm(model, optimizer, steps)
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer, mode="measure") as recorder:
        through_logits(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        found = recorder.harvest()
    optimizer.step()
    want = frozen.row_gradients(batch) @ (flat(list(model.parameters())) - frozen.theta)
    assert found is not None
    account = found.attribution
    assert account is not None
    torch.testing.assert_close(account.total, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert float(account.moved["earlier_batches"].abs().max()) <= 1e-5 * float(account.pushes.abs().max())


def test_a_pass_of_its_own_knows_the_other_micro_batches() -> None:
    model, parts = build("llama"), [ragged(2), uneven()]
    optimizer = torch.optim.AdamW(split_groups(model), lr=1e-3)
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer, mode="measure") as recorder:
        for part in parts:
            (through_logits(model, part) / 2).backward()
        found = recorder.harvest(scale=2)
    optimizer.step()
    step = flat(list(model.parameters())) - frozen.theta
    chosen, rejected = zip(*((frozen.row_gradients(part) @ step).chunk(2) for part in parts), strict=True)
    want = torch.cat([*chosen, *rejected])
    assert found is not None
    assert found.attribution is not None
    torch.testing.assert_close(found.attribution.total, want, rtol=0, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("budget", [None, SMALL], ids=["kept", "as they come"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_adapters_that_start_at_zero(budget: int | None, scale: float) -> None:
    """At the second step, A has no second moment yet: its gradient was zero while B was."""
    model, batch = lora_everywhere("llama"), ragged(3)
    for name, part in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(part)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-3, weight_decay=0)

    def backward() -> None:
        through_logits(model, batch, lambda chosen, rejected: scale * dpo(chosen, rejected)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    backward()
    optimizer.step()
    optimizer.zero_grad()
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer, memory_budget=budget) as recorder:
        backward()
        found = recorder.harvest()
    optimizer.step()
    step = flat([part for part in model.parameters() if part.requires_grad]) - frozen.theta
    want = frozen.row_gradients(batch) @ step
    assert found is not None
    assert found.attribution is not None
    assert float((found.attribution.total - want).norm() / want.norm()) < 0.1


def weighted(model: nn.Module, batch: PairBatch) -> torch.Tensor:
    """A loss that weighs a response's later tokens more, and the prompts of chosen ones a little."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logps = logits[:, :-1].double().log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    marks = batch.completion_mask[:, 1:].double()
    late = marks * torch.linspace(0.5, 1.5, marks.shape[1])
    chosen, rejected = (logps * late).sum(1).chunk(2)
    return dpo(chosen, rejected) - 0.02 * (logps * marks).sum(1).chunk(2)[0].mean()


def test_a_loss_that_weighs_tokens_is_accounted_for_as_it_is() -> None:
    model, batch = build("llama"), ragged(3)
    optimizer = torch.optim.AdamW(split_groups(model), lr=1e-3)
    warm(model, optimizer)
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer) as recorder:
        weighted(model, batch).backward()
        found = recorder.harvest()
    # Each row's part of the loss's gradient: that of the loss with every other row held constant.
    gradients = frozen.row_gradients(batch)
    assert found is not None
    account = found.attribution
    assert account is not None
    optimizer.step()
    want = gradients @ (flat(list(model.parameters())) - frozen.theta)
    torch.testing.assert_close(account.total, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert float(account.moved["earlier_batches"].abs().max()) <= 1e-4 * float(account.pushes.abs().max())


@pytest.mark.parametrize("budget", [None, SMALL], ids=["kept", "as they come"])
def test_an_element_that_never_had_a_gradient_takes_the_step_that_adam_gives_it(budget: int | None) -> None:
    model, batch = build("llama"), ragged(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for _ in range(30):  # on the batch, one pair of which says other things then
        other = batch.input_ids.clone()
        other[0, batch.completion_mask[0].bool()] = 71
        through_logits(model, replace(batch, input_ids=other)).backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen = Frozen(model, optimizer)
    with attach(model, optimizer=optimizer, memory_budget=budget) as recorder:
        through_logits(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        found = recorder.harvest()
    optimizer.step()
    gradients = frozen.row_gradients(batch)
    want = gradients @ (flat(list(model.parameters())) - frozen.theta)
    assert found is not None
    account = found.attribution
    assert account is not None
    error = float((account.total - want).norm() / want.norm())
    assert error < 0.3  # a fifth of a pair's tokens are new, and for others P before the step is a poor guess
    naive = torch.stack(list(frozen.account(batch, dpo, 1.0)[1].values())).sum(0)
    assert float((naive - want).norm() / want.norm()) > 1000 * error


def test_a_fused_head_and_checkpointing_and_a_learning_rate_of_ones_own() -> None:
    model, batch = with_fused_head(lora_everywhere("llama")), ragged(3)
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    warm(model, optimizer)
    frozen = Frozen(model, optimizer, lora_everywhere("llama"))
    frozen.lr = torch.full_like(frozen.lr, 5e-4)
    with attach(model, optimizer=optimizer) as recorder:
        through_fused_head(model, batch).backward()
        found = recorder.harvest(lr=5e-4)
    assert found is not None
    check(found.attribution, *frozen.account(batch, dpo, 1.0), frozen)
