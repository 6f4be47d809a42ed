"""The linear form of a step against the step that the optimizer then takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradent.attribution.update_rule import FIRST_STEP, UpdateRule, find_update_rule

RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "SGD, decay": lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.3),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.3),
    "dampening": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.4),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3),
    "maximize": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, maximize=True, weight_decay=0.3),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "Adam, decay": lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.3, maximize=True),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3),
    "AdamW, amsgrad, not foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, amsgrad=True, foreach=False),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3, fused=True),
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95), foreach=True),
}


def predicted(rule: UpdateRule, number: int, tensor: Tensor) -> Tensor:
    """Δθ of a parameter, from the rule alone."""
    terms, moment, values = rule.terms(number), rule.momentum(number), rule.values(number)
    assert tensor.grad is not None
    step = terms.fresh * tensor.grad
    if moment is not None:
        step = step + terms.carried * moment
    if not rule.is_decoupled:
        step = step + terms.decay * values
    step = metric(rule, number) * step
    return -terms.lr * (step + terms.decay * values if rule.is_decoupled else step)


def metric(rule: UpdateRule, number: int) -> Tensor:
    """P."""
    found = rule.elements(number)
    if found.second is None:
        return torch.ones(())
    return 1 / ((found.second / found.correction).sqrt() + found.eps)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_rule_is_the_step_that_follows(name: str, steps: int) -> None:
    torch.manual_seed(0)
    tensors = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 4), (5,), (2, 3, 2))]
    optimizer = RULES[name]([{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.02, "weight_decay": 0.0}])
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.randn_like(tensor) * 3
        optimizer.step()
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    rule = find_update_rule(optimizer, dict(zip("abc", tensors, strict=True)), is_next=True)
    assert isinstance(rule, UpdateRule)
    want = [predicted(rule, number, tensor) for number, tensor in enumerate(tensors)]
    before = [tensor.detach().clone() for tensor in tensors]
    optimizer.step()
    for tensor, old, change in zip(tensors, before, want, strict=True):
        torch.testing.assert_close(tensor.detach() - old, change.detach(), rtol=1e-9, atol=1e-12)


def test_the_preconditioner_before_the_step_is_that_of_the_steps_so_far() -> None:
    tensor = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.AdamW([tensor], lr=0.1, betas=(0.9, 0.99), eps=1e-3)
    for grad in ([1.0, 2.0], [3.0, -1.0]):
        tensor.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    rule = find_update_rule(optimizer, {"a": tensor})
    assert isinstance(rule, UpdateRule)
    second = (0.99 * 0.01 * torch.tensor([1.0, 4.0]) + 0.01 * torch.tensor([9.0, 1.0])) / (1 - 0.99**2)
    torch.testing.assert_close(metric(rule, 0), 1 / (second.double().sqrt() + 1e-3), rtol=1e-6, atol=0)


class Sign(torch.optim.SGD):
    """An optimizer whose step is not its parent's."""

    def step(self, closure: Any = None) -> Any:
        """Nothing."""


def test_what_has_no_linear_form_says_so() -> None:
    tensor = nn.Parameter(torch.ones(2))
    for optimizer, said in (
        (Sign([tensor], lr=0.1), "Sign has no diagonal"), (torch.optim.Adafactor([tensor]), "Adafactor has no"),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), "does not hold 'a'"),
        (torch.optim.Adam([tensor]), FIRST_STEP),
    ):  # fmt: skip
        rule = find_update_rule(optimizer, {"a": tensor})
        assert isinstance(rule, str)
        assert said in rule


def test_a_parameter_without_a_second_moment_moves_by_the_limit() -> None:
    tensors = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.Adam(tensors.values(), lr=0.1)
    tensors["a"].grad = torch.ones(2)
    optimizer.step()
    rule = find_update_rule(optimizer, tensors)
    assert isinstance(rule, UpdateRule)
    assert torch.equal(rule.elements(1).second, torch.zeros(2))  # type: ignore[arg-type]
    tensors["b"].grad = torch.tensor([3.0, -0.01])
    terms = rule.terms(1)
    optimizer.step()
    moved = tensors["b"].detach() - 1
    torch.testing.assert_close(moved, -terms.lr * terms.limit * torch.tensor([1.0, -1.0]), rtol=1e-4, atol=0)
