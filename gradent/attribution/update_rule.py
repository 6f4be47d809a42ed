"""An optimizer's next step, written as a linear form of the gradient that it will get.

For every parameter, with P the diagonal preconditioner and m the first moment as they are before the step,

    Δθ = −lr [ P ∘ ( fresh · (grad + coupled · θ) + carried · m ) + decoupled · θ ]

SGD has P = 1, Adam `P = 1 / (√v̂ + ε)` with `v̂ = v / (1 − β₂ᵗ)`, v as it is before the step. The step itself takes P of
the new v, which the gradient decides: with `is_next` that one, once the gradient is there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_pre_hooks

from gradent.kernels.common.account import ElementMetric
from gradent.kernels.common.numerics import accumulator
from gradent.model.preconditioner import describe_optimizer

__all__ = ["FIRST_STEP", "Terms", "UpdateRule", "find_update_rule", "is_diagonal", "unwrap_optimizer"]

FIRST_STEP = "before its first step, Adam has no second moment"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The numbers of one parameter's linear form."""

    lr: float
    fresh: float = 1.0
    limit: float = 0.0  # what `fresh · P · grad` comes to where P is all of this gradient's making
    carried: float = 0.0
    coupled: float = 0.0
    decoupled: float = 0.0
    lasting: float = 1.0  # what a gradient that stays the same comes to with what is carried, over `fresh`

    @property
    def decay(self) -> float:
        """What multiplies `⟨g, P θ⟩` or, decoupled, `⟨g, θ⟩`."""
        return abs(self.fresh) * self.coupled + self.decoupled


class UpdateRule:
    """The step that an optimizer is about to take; parameters go by number."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], *, is_next: bool = False
    ) -> None:
        self._optimizer, self._is_next = optimizer, is_next
        self._tensors = list(parameters.values())
        self._groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
        self.is_adaptive = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        self.is_decoupled = self.is_adaptive and all(map(self._decouples, optimizer.param_groups))
        """Whether weight decay passes the preconditioner by."""

    @property
    def count(self) -> int:
        """How many parameters there are."""
        return len(self._tensors)

    @property
    def step(self) -> int:
        """Steps that the optimizer has taken, the same on all ranks; 0 where it does not count them (SGD)."""
        return int(max(self._steps, default=0))

    def holds(self, number: int) -> bool:
        """Whether the optimizer steps this parameter."""
        return id(self._tensors[number]) in self._groups

    @property
    def has_momentum(self) -> bool:
        """Whether any parameter's step carries some of the last ones on."""
        return any(self.terms(number).carried for number in range(len(self._tensors)))

    @property
    def has_decay(self) -> bool:
        """Whether any parameter decays."""
        return any(self.terms(number).decay for number in range(len(self._tensors)))

    def terms(self, number: int, lr: float | None = None) -> Terms:
        """The numbers of a parameter's form, of the step to come; `lr` in place of the group's own."""
        group, state = self._group(number), self._state(number)
        rate = float(group["lr"]) if lr is None else lr
        sign = -1.0 if group.get("maximize") else 1.0
        decay = float(group["weight_decay"])
        if not self.is_adaptive:
            return _sgd(group, rate, sign, decay, is_first=state.get("momentum_buffer") is None)
        beta, step = float(group["betas"][0]), self._steps[number] + 1
        corrected, second = 1 - beta**step, float(group["betas"][1])
        is_decoupled = self._decouples(group)
        return Terms(
            lr=rate, fresh=sign * (1 - beta) / corrected, carried=beta / corrected,
            coupled=0.0 if is_decoupled else decay, decoupled=decay if is_decoupled else 0.0,
            limit=sign * (1 - beta) / corrected * math.sqrt((1 - second**step) / (1 - second)),
            lasting=corrected / (1 - beta) if beta < 1 else 1.0,
        )  # fmt: skip

    def momentum(self, number: int) -> Tensor | None:
        """m, as it is before the step; None where there is none."""
        state = self._state(number)
        moment: Tensor | None = state.get("exp_avg" if self.is_adaptive else "momentum_buffer")
        return moment

    def values(self, number: int) -> Tensor:
        """θ."""
        return self._tensors[number].detach()

    def elements(self, number: int) -> ElementMetric:
        """P of every element, as it is before the step, or with `is_next` as the step takes it."""
        if not self.is_adaptive:
            return ElementMetric()
        state, group, tensor = self._state(number), self._group(number), self._tensors[number]
        beta, step = float(group["betas"][1]), self._steps[number]
        if self._is_next:
            second, step = self._next_second(number), step + 1
        else:
            second = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
        if second is None:  # it had no gradient yet, so every element of it is new
            second, step = torch.zeros_like(tensor), max(step, 1.0)
        return ElementMetric(
            second=second, correction=1 - beta**step, eps=float(group["eps"]),
            growth=0.0 if self._is_next else math.sqrt((1 - beta) / (1 - beta ** (step + 1))),
        )  # fmt: skip

    def _next_second(self, number: int) -> Tensor | None:
        """v after the step, from the gradient that the parameter has now; None without a gradient."""
        state, group, tensor = self._state(number), self._group(number), self._tensors[number]
        wide, beta = accumulator(tensor.dtype), float(group["betas"][1])
        if tensor.grad is None:
            return None
        grad, terms = tensor.grad.to(wide), self.terms(number)
        if terms.coupled:
            grad = grad + terms.coupled * math.copysign(1.0, terms.fresh) * tensor.detach()
        second = (1 - beta) * grad.square()
        if "exp_avg_sq" in state:
            second += beta * state["exp_avg_sq"].to(wide)
        if group.get("amsgrad") and "max_exp_avg_sq" in state:
            second = torch.maximum(second, state["max_exp_avg_sq"].to(wide))
        return second

    @cached_property
    def _steps(self) -> list[float]:
        """Steps that the optimizer has taken, by parameter: read at once, where they are on a device (fused Adam)."""
        steps = [torch.as_tensor(self._state(number).get("step", 0.0)) for number in range(len(self._tensors))]
        found = [0.0] * len(steps)
        for device in {step.device for step in steps}:
            here = [number for number, step in enumerate(steps) if step.device == device]
            values = torch.stack([steps[number].reshape(()).to(torch.float32) for number in here]).tolist()
            for number, value in zip(here, values, strict=True):
                found[number] = value
        return found

    def _decouples(self, group: Mapping[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", isinstance(self._optimizer, torch.optim.AdamW)))

    def _group(self, number: int) -> dict[str, Any]:
        return self._groups[id(self._tensors[number])]

    def _state(self, number: int) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.state.get(self._tensors[number], {})
        return state


def _sgd(group: Mapping[str, Any], lr: float, sign: float, decay: float, *, is_first: bool) -> Terms:
    momentum, dampening = float(group["momentum"]), float(group["dampening"])
    if momentum == 0 or (is_first and not group["nesterov"]):
        return Terms(lr=lr, fresh=sign, coupled=decay)
    taken = 1.0 if is_first else 1 - dampening
    lasting = 1 / (1 - momentum) if momentum < 1 else 1.0
    if group["nesterov"]:
        fresh = 1 + momentum * taken
        lasting = (1 + momentum * (1 - dampening) * lasting) / fresh
        return Terms(lr=lr, fresh=sign * fresh, carried=momentum**2, coupled=decay, lasting=lasting)
    return Terms(lr=lr, fresh=sign * taken, carried=momentum, coupled=decay, lasting=lasting)


def unwrap_optimizer(optimizer: object) -> object:
    """The optimizer under accelerate's wrapper, which steps as it does."""
    return getattr(optimizer, "optimizer", None) if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer


def _has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))  # noqa: SLF001  (as above)


def is_diagonal(optimizer: object) -> bool:
    """Whether an optimizer is one whose step is known to be a linear form with a diagonal P."""
    optimizer = unwrap_optimizer(optimizer)
    known: Sequence[Callable[..., Any]] = [kind.step for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)]
    steps = [inspect.unwrap(step) for step in known]
    return isinstance(optimizer, torch.optim.Optimizer) and inspect.unwrap(type(optimizer).step) in steps


def find_update_rule(optimizer: object, parameters: Mapping[str, Tensor], *, is_next: bool = False) -> UpdateRule | str:
    """The rule of an optimizer, or why its step is no linear form with a diagonal P."""
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer) or not is_diagonal(optimizer):
        return (
            f"{describe_optimizer(optimizer)} has no diagonal preconditioner that gradent knows; a step is split into "
            "its sources under torch.optim.SGD, Adam and AdamW"
        )
    hooks = (*optimizer._optimizer_step_pre_hooks.values(), *_global_optimizer_pre_hooks.values())  # noqa: SLF001
    if any(not getattr(hook, "__module__", "").startswith("gradent.") for hook in hooks):
        return "a hook before the optimizer's step may change what it takes"
    hooked = [name for name, tensor in parameters.items() if _has_hooks(tensor)]
    if hooked:
        return f"a hook on the gradient of {hooked[0]!r} may change it"
    rule = UpdateRule(optimizer, parameters, is_next=is_next)
    missing = [name for number, name in enumerate(parameters) if not rule.holds(number)]
    if missing:
        return f"the optimizer does not hold {missing[0]!r}, which is trainable"
    for name, tensor in parameters.items() if rule.is_adaptive else ():
        second = optimizer.state.get(tensor, {}).get("exp_avg_sq")
        if second is not None and second.shape != tensor.shape:
            shape = list(tensor.shape)
            return f"the second moment of {name!r} has shape {list(second.shape)}, the parameter {shape}"
    if rule.is_adaptive and not is_next and not any(optimizer.state.get(tensor) for tensor in parameters.values()):
        return FIRST_STEP
    return rule
