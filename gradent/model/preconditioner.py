"""The optimizer's own geometry: `⟨a, b⟩ = Σ a_k b_k P_k` with P the Adam(W) preconditioner at this step.

First-order changes under Adam without momentum are the paper's equations with this inner product; weight decay and the
learning rate are no part of P.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradent.errors import InputError

__all__ = ["metric_roots"]


def metric_roots(optimizer: object, parameters: Mapping[str, Tensor]) -> Callable[[int], Tensor]:
    """Adam's `√P`, `P = 1 / (√v̂ + ε)`, `v̂ = v / (1 − β₂ᵗ)`: parameter number -> tensor of the parameter's shape."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"metric is a {type(optimizer).__name__}; accepted are None (Euclidean) and an Adam or AdamW optimizer."
        )
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    tensors = list(parameters.values())
    for name, tensor in parameters.items():
        state = optimizer.state.get(tensor, {})
        if id(tensor) not in groups or "exp_avg_sq" not in state or "step" not in state:
            raise InputError(
                f"metric={type(optimizer).__name__}: no second moment (exp_avg_sq) for {name!r}. Accepted is an "
                "Adam or AdamW optimizer that holds every trainable parameter and has taken at least one step: measure "
                "after optimizer.step(), or use metric=None."
            )

    def root(number: int) -> Tensor:
        tensor = tensors[number]
        state, group = optimizer.state[tensor], groups[id(tensor)]
        second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        corrected: Tensor = second.to(wide, copy=True).div_(_correction(group["betas"][1], state["step"]))
        return corrected.sqrt_().add_(float(group["eps"])).rsqrt_()

    return root


def _correction(beta: float | Tensor, step: float | Tensor) -> float | Tensor:
    """`1 − βᵗ`; a step on a GPU (fused Adam) stays there, so that nothing waits for it."""
    if isinstance(step, Tensor):
        step = step.double() if step.device.type == "cuda" else float(step)
    return 1 - beta**step
