"""When a row's gradient is so small that autograd may form it whole: LoRA, mostly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradent.kernels.precision import is_exact

__all__ = ["autograd_suffices"]

EXACT = (torch.float32, torch.float64)
"""Dtypes in which autograd's gradients lose nothing that matters."""


def autograd_suffices(
    model: nn.Module, parameters: Sequence[Tensor], rows: int, device: torch.device, budget: int
) -> bool:
    """Whether autograd's own gradients of rows, each with a forward of its own, are as good as reduced uses.

    They are to be a small part of the model, to be exact as they come (nothing in the model is narrower than float32),
    and nobody is to notice (a hook on a parameter would be called).

    Args:
        model: the model.
        parameters: its trainable parameters.
        rows: of a micro-batch, all of whose gradients are held.
        device: where the model runs.
        budget: bytes of scratch.

    Returns:
        The answer.
    """
    if not is_exact(device):
        return False
    if any(type(one) is not nn.Parameter or one._backward_hooks for one in parameters):  # noqa: SLF001  (no public name)
        return False
    everything = list(model.parameters())
    if any(one.dtype not in EXACT for one in everything):
        return False
    whole, part = (sum(one.numel() * one.element_size() for one in some) for some in (everything, parameters))
    return rows * part <= min(whole // 2, budget)
