"""Steps that have no account: what is said, and that nothing else is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gradent import attach
from gradent.hooks.overhead import Clock
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
    norms = GradientNorms(weights, Clock())
    assert norms.factor() == "the end of the backward was not seen"
    total = (weights[0] * 300).sum() + (weights[1] * 40).sum()
    total.register_hook(lambda grad: norms.start())  # type: ignore[no-untyped-call]
    total.backward()
    for weight in weights[:2]:
        assert weight.grad is not None
        weight.grad.mul_(0.125)
    assert norms.factor() == pytest.approx(0.125, rel=1e-6)


def loop(
    model: nn.Module, optimizer: object, change: Callable[[], None] = lambda: None, backwards: int = 1
) -> str | None:
    """What is said of a step's account, None for nothing; `change` comes after each backward."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gradent").addHandler(handler)
    try:
        with attach(model, optimizer=optimizer) as recorder:  # type: ignore[arg-type]
            for _ in range(backwards):
                through_logits(model, ragged(2)).backward()
                change()
            found = recorder.harvest()
    finally:
        logging.getLogger("gradent").removeHandler(handler)
    assert found is not None
    assert (found.attribution is None) == bool(said)
    return said[0] if said else None


def test_weights_that_have_moved_since_the_backward() -> None:
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    assert loop(model, optimizer) is None
    said = loop(model, optimizer, optimizer.step)
    assert said is not None
    assert "the weights have changed since the backward" in said
    assert "the weights have changed" in str(loop(model, optimizer, optimizer.step, backwards=3))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("way", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_every_implementation_of_a_step_is_seen(kind: type[torch.optim.Optimizer], way: dict[str, bool]) -> None:
    model = build("llama")
    optimizer = kind(model.parameters(), lr=1e-3, **way)  # type: ignore[call-arg]
    through_logits(model, ragged(2)).backward()
    optimizer.step()
    assert "the weights have changed" in str(loop(model, optimizer, optimizer.step))


def test_what_comes_between_the_gradient_and_the_step() -> None:
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = optimizer.register_step_pre_hook(lambda *args: None)
    assert "a hook before the optimizer's step" in str(loop(model, optimizer))
    handle.remove()
    weight = next(model.parameters())
    hook = weight.register_hook(lambda grad: grad * 0.5)  # type: ignore[no-untyped-call]
    assert "a hook on the gradient of" in str(loop(model, optimizer))
    hook.remove()

    class Lookahead:
        """A wrapper that steps in its own way."""

        def __init__(self) -> None:
            self.optimizer = optimizer

    assert "tests.Lookahead over SGD has no diagonal preconditioner" in str(loop(model, Lookahead()))
    model.zero_grad()

    def overflow() -> None:
        assert weight.grad is not None
        weight.grad[0] = float("inf")

    assert "a gradient is not finite" in str(loop(model, optimizer, overflow))


def test_a_gradient_that_has_no_norm_does_not_end_the_backward() -> None:
    model = build("llama")
    table = model.get_input_embeddings()
    table.sparse = True
    with attach(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2)) as recorder:
        through_logits(model, ragged(2)).backward()
        found = recorder.harvest()
    assert found is not None
    assert found.attribution is None
