"""The optimizer's geometry: entries weighted by Adam's preconditioner, and what that predicts of a real Adam step."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2LMHeadModel

from gradent.attribution.update_rule import find_update_rule
from gradent.errors import InputError
from gradent.measurement import measure, sequence_logps
from tests.batches import ragged
from tests.truth import call


def gradients(model: torch.nn.Module) -> list[list[torch.Tensor]]:
    batch, found = ragged(2), []
    parameters = list(model.parameters())
    for row in range(4):
        ids, marks = batch.row(row)
        logps = call(model, ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        found.append(list(torch.autograd.grad(logps[marks[1:]].sum(), parameters)))
    return found


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("engine", ["hooks", "func"])
def test_entries_are_weighted_by_the_preconditioner(
    tiny_gpt2: GPT2LMHeadModel, kind: type[torch.optim.Optimizer], engine: str
) -> None:
    optimizer = kind(tiny_gpt2.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-6)  # type: ignore[call-arg]
    for grads in gradients(tiny_gpt2)[:2]:
        for parameter, grad in zip(tiny_gpt2.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    gram = measure(tiny_gpt2, ragged(2), metric=optimizer, engine=engine)  # type: ignore[arg-type]
    found, parameters = gradients(tiny_gpt2), list(tiny_gpt2.parameters())
    weights = [
        1 / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.99 ** float(optimizer.state[p]["step"]))).sqrt() + 1e-6)
        for p in parameters
    ]

    def product(left: int, right: int) -> float:
        return float(sum((w * x * y).sum() for w, x, y in zip(weights, found[left], found[right], strict=True)))

    for pair in range(2):
        scale = (product(pair, pair) * product(pair + 2, pair + 2)) ** 0.5
        assert abs(float(gram.inner[pair]) - product(pair, pair + 2)) <= 1e-9 * scale
        assert abs(float(gram.chosen_sq[pair]) / product(pair, pair) - 1) <= 1e-9


def test_a_real_adam_step_moves_log_probs_as_the_metric_says(tiny_gpt2: GPT2LMHeadModel) -> None:
    batch = ragged(1)
    # No momentum: then the step is -lr · P · gradient.
    optimizer = torch.optim.Adam(tiny_gpt2.parameters(), lr=1e-9, betas=(0.0, 0.999))
    for grads in gradients(tiny_gpt2)[:2]:
        for parameter, grad in zip(tiny_gpt2.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    before = sequence_logps(tiny_gpt2, batch)
    chosen = gradients(tiny_gpt2)[0]
    for parameter, grad in zip(tiny_gpt2.parameters(), chosen, strict=True):
        parameter.grad = -grad  # ascend the chosen log-prob
    for group in optimizer.param_groups:
        group["lr"] = 1e-7
    optimizer.step()
    # The preconditioner that this step used is the one that the optimizer now holds.
    gram = measure(tiny_gpt2, batch, metric=optimizer)
    after = sequence_logps(tiny_gpt2, batch)
    assert float(after[0] - before[0]) / 1e-7 == pytest.approx(float(gram.chosen_sq), rel=1e-3)
    assert float(after[1] - before[1]) / 1e-7 == pytest.approx(float(gram.inner), rel=1e-3)


@pytest.mark.parametrize("stage", ["never stepped", "no Adam", "other parameters"])
def test_an_optimizer_without_second_moments_is_refused(tiny_gpt2: GPT2LMHeadModel, stage: str) -> None:
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(tiny_gpt2.parameters())
    if stage == "no Adam":
        optimizer = torch.optim.SGD(tiny_gpt2.parameters(), lr=0.1)
    elif stage == "other parameters":
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(InputError, match="exp_avg_sq"):
        measure(tiny_gpt2, ragged(1), metric=optimizer)


def test_a_metric_that_is_no_optimizer_is_refused(tiny_gpt2: GPT2LMHeadModel) -> None:
    with pytest.raises(InputError, match="accepted are None"):
        measure(tiny_gpt2, ragged(1), metric="adam")  # type: ignore[arg-type]


def stepped(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_second_moments_of_other_optimizers_are_not_adams(tiny_gpt2: GPT2LMHeadModel) -> None:
    """RAdam and NAdam have an `exp_avg_sq` too, and another preconditioner."""
    for kind in (torch.optim.RAdam, torch.optim.NAdam):
        with pytest.raises(InputError, match=f"metric is a {kind.__name__}, which has no second moment"):
            measure(tiny_gpt2, ragged(1), metric=stepped(kind(tiny_gpt2.parameters()), tiny_gpt2))


def test_a_moment_of_another_shape_is_not_broadcast(tiny_gpt2: GPT2LMHeadModel) -> None:
    """As GaLore of rank 1 and APOLLO-Mini have it, inside or outside of torch's classes."""
    optimizer = stepped(torch.optim.AdamW(tiny_gpt2.parameters()), tiny_gpt2)
    name, weight = next((name, part) for name, part in tiny_gpt2.named_parameters() if part.dim() == 2)
    optimizer.state[weight]["exp_avg_sq"] = optimizer.state[weight]["exp_avg_sq"][:1]
    with pytest.raises(InputError, match=rf"second moment \(exp_avg_sq\) of '{name}' has shape \[1, "):
        measure(tiny_gpt2, ragged(1), metric=optimizer)
    rule = find_update_rule(optimizer, dict(tiny_gpt2.named_parameters()))
    assert isinstance(rule, str)
    assert f"the second moment of '{name}' has shape [1, " in rule
