"""The optimizer's own geometry: `⟨a, b⟩ = Σ a_k b_k P_k` with P the Adam(W) preconditioner at this step.

First-order changes under Adam without momentum are the paper's equations with this inner product; weight decay and the
learning rate are no part of P.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradent.errors import InputError

__all__ = ["describe_optimizer", "is_adam", "metric_obstacle", "metric_roots"]

_KNOWN = [inspect.unwrap(kind.step) for kind in (torch.optim.Adam, torch.optim.AdamW)]
"""Whose steps have the preconditioner `1 / (√v̂ + ε)`."""


def metric_roots(optimizer: object, parameters: Mapping[str, Tensor]) -> Callable[[int], Tensor]:
    """Adam's `√P`, `P = 1 / (√v̂ + ε)`, `v̂ = v / (1 − β₂ᵗ)`: parameter number -> tensor of the parameter's shape."""
    obstacle = metric_obstacle(optimizer, parameters)
    if obstacle is not None:
        raise InputError(obstacle)
    optimizer = _innermost(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    tensors = list(parameters.values())

    def root(number: int) -> Tensor:
        tensor = tensors[number]
        state, group = optimizer.state[tensor], groups[id(tensor)]
        second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        corrected: Tensor = second.to(wide, copy=True).div_(_correction(group["betas"][1], state["step"]))
        return corrected.sqrt_().add_(float(group["eps"])).rsqrt_()

    return root


def metric_obstacle(optimizer: object, parameters: Mapping[str, Tensor]) -> str | None:
    """Why an optimizer has no such preconditioner of these parameters; None where it has."""
    inner = _innermost(optimizer)
    if not isinstance(inner, torch.optim.Optimizer) or not is_adam(inner):
        return (
            f"metric is a {describe_optimizer(optimizer)}, which has no second moment (exp_avg_sq) that gradent knows; "
            "accepted are None (Euclidean) and torch.optim's Adam or AdamW."
        )
    held = {id(tensor) for group in inner.param_groups for tensor in group["params"]}
    for name, tensor in parameters.items():
        state = inner.state.get(tensor, {})
        if id(tensor) not in held or "exp_avg_sq" not in state or "step" not in state:
            return (
                f"metric={describe_optimizer(optimizer)}: no second moment (exp_avg_sq) for {name!r}. Accepted is an "
                "Adam or AdamW optimizer that holds every trainable parameter and has taken at least one step: measure "
                "after optimizer.step(), or use metric=None."
            )
        if state["exp_avg_sq"].shape != tensor.shape:
            return (
                f"metric={describe_optimizer(optimizer)}: the second moment (exp_avg_sq) of {name!r} has shape "
                f"{list(state['exp_avg_sq'].shape)}, the parameter {list(tensor.shape)}; accepted is one of its shape."
            )
    return None


def is_adam(optimizer: object) -> bool:
    """Whether an optimizer steps as torch's Adam or AdamW does."""
    inner = _innermost(optimizer)
    return isinstance(inner, torch.optim.Optimizer) and inspect.unwrap(type(inner).step) in _KNOWN


def describe_optimizer(optimizer: object) -> str:
    """An optimizer's class in words, with the package that it is from unless that is torch, and what it wraps."""
    names = []
    while True:
        kind = type(optimizer)
        package = kind.__module__.partition(".")[0]
        if kind.__name__ != "AcceleratedOptimizer":
            names.append(kind.__name__ if package in ("torch", "builtins") else f"{package}.{kind.__name__}")
        if not hasattr(optimizer, "optimizer"):
            return " over ".join(names)
        optimizer = optimizer.optimizer


def _innermost(optimizer: object) -> object:
    """The optimizer under its wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _correction(beta: float | Tensor, step: float | Tensor) -> float | Tensor:
    """`1 − βᵗ`; a step on a GPU (fused Adam) stays there, so that nothing waits for it."""
    if isinstance(step, Tensor):
        step = step.double() if step.device.type == "cuda" else float(step)
    return 1 - beta**step
