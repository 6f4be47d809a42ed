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
from typing import Any

import torch
from torch import Tensor

from gradent.kernels.common.numerics import accumulator

__all__ = ["FIRST_STEP", "Terms", "UpdateRule", "find_update_rule"]

FIRST_STEP = "before its first step, Adam has no second moment"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The numbers of one parameter's linear form."""

    lr: float
    fresh: float = 1.0
    carried: float = 0.0
    coupled: float = 0.0
    decoupled: float = 0.0

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
        self._last: tuple[int, Tensor] | None = None
        self._tensors = list(parameters.values())
        self._groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
        self.is_adaptive = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        self.without_state: set[int] = set()
        """Parameters that a second moment was asked for and that have none yet."""

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
        beta, step = float(group["betas"][0]), float(state["step"]) + 1 if "step" in state else 1.0
        corrected = 1 - beta**step
        is_decoupled = group.get("decoupled_weight_decay", isinstance(self._optimizer, torch.optim.AdamW))
        return Terms(
            lr=rate, fresh=sign * (1 - beta) / corrected, carried=beta / corrected,
            coupled=0.0 if is_decoupled else decay, decoupled=decay if is_decoupled else 0.0,
        )  # fmt: skip

    def momentum(self, number: int) -> Tensor | None:
        """m, as it is before the step; None where there is none."""
        state = self._state(number)
        moment: Tensor | None = state.get("exp_avg" if self.is_adaptive else "momentum_buffer")
        return moment

    def root(self, number: int) -> Tensor:
        """`√P`, wide."""
        return self._denominator(number).rsqrt()

    def decay_direction(self, number: int) -> Tensor:
        """What stands for θ among directions that P multiplies: θ itself, or `θ / P` where the decay is decoupled."""
        tensor = self._tensors[number].detach()
        if not self.is_adaptive or self.terms(number).decoupled == 0:
            return tensor
        return tensor * self._denominator(number)

    def _denominator(self, number: int) -> Tensor:
        """`1 / P`, wide; ones where the second moment is missing, which `without_state` then says."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        self._last = None
        state, group, tensor = self._state(number), self._group(number), self._tensors[number]
        wide, beta = accumulator(tensor.dtype), float(group["betas"][1])
        if self._is_next:
            second, step = self._next_second(number), float(state.get("step", 0)) + 1
        else:
            second, step = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"), state.get("step", 1)
        if second is None:
            self.without_state.add(number)
            return torch.ones_like(tensor, dtype=wide)
        corrected = second.to(wide, copy=True).div_(1 - beta ** float(step))
        denominator: Tensor = corrected.sqrt_().add_(float(group["eps"]))
        self._last = number, denominator  # the root and the decay both want it
        return denominator

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
    if group["nesterov"]:
        return Terms(lr=lr, fresh=sign * (1 + momentum * taken), carried=momentum**2, coupled=decay)
    return Terms(lr=lr, fresh=sign * taken, carried=momentum, coupled=decay)


def find_update_rule(optimizer: object, parameters: Mapping[str, Tensor], *, is_next: bool = False) -> UpdateRule | str:
    """The rule of an optimizer, or why its step is no linear form with a diagonal P."""
    while hasattr(optimizer, "optimizer"):  # accelerate's, DeepSpeed's
        optimizer = optimizer.optimizer
    known: Sequence[Callable[..., Any]] = [kind.step for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)]
    if not isinstance(optimizer, torch.optim.Optimizer) or inspect.unwrap(type(optimizer).step) not in [
        inspect.unwrap(step) for step in known
    ]:
        return (
            f"{type(optimizer).__name__} has no diagonal preconditioner that gradent knows; a step is split into its "
            "sources under torch.optim.SGD, Adam and AdamW"
        )
    rule = UpdateRule(optimizer, parameters, is_next=is_next)
    missing = [name for number, name in enumerate(parameters) if not rule.holds(number)]
    if missing:
        return f"the optimizer does not hold {missing[0]!r}, which is trainable"
    if rule.is_adaptive and not is_next and not any(optimizer.state.get(tensor) for tensor in parameters.values()):
        return FIRST_STEP
    return rule
