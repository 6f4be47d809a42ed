"""Steps that have no account: what is said, and that nothing else is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gradent import attach
from gradent.hooks.piggyback.gradient_norms import GradientNorms
from tests.batches import ragged
from tests.trainer_steps import through_logits
from tests.zoo import build


def clip_by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def drop(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


REASONS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "clipped by value": (clip_by_value, "other means than one factor for all"),
    "stepped inside the backward": (drop, "it steps inside the backward"),
}


@pytest.mark.parametrize("name", REASONS)
def test_gradients_that_are_not_the_backwards(name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, reason = REASONS[name]
    model, batch = build("llama"), ragged(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with caplog.at_level(logging.WARNING, "gradent"), attach(model, optimizer=optimizer) as recorder:
        for _ in range(2):
            through_logits(model, batch).backward()
            change(model)
            found = recorder.harvest()
            assert found is not None
            assert found.attribution is None
            assert len(found.gram) == 2
    (said,) = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert said.startswith("gradent gives no account of a step: ")
    assert reason in said


def test_an_optimizer_without_a_diagonal_metric(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build("llama"), ragged(2)
    optimizer = torch.optim.Adafactor(model.parameters())
    with caplog.at_level(logging.WARNING, "gradent"), attach(model, optimizer=optimizer) as recorder:
        through_logits(model, batch).backward()
        found = recorder.harvest()
    assert found is not None
    assert found.attribution is None
    (said,) = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert "Adafactor has no diagonal preconditioner that gradent knows" in said


def test_the_factor_of_clipping_and_of_a_scaler() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))]
    norms = GradientNorms(weights)
    assert norms.factor() == "the end of the backward was not seen"
    total = (weights[0] * 300).sum() + (weights[1] * 40).sum()
    total.register_hook(lambda grad: norms.start())  # type: ignore[no-untyped-call]
    total.backward()
    for weight in weights[:2]:
        assert weight.grad is not None
        weight.grad.mul_(0.125)
    assert norms.factor() == pytest.approx(0.125, rel=1e-6)
