"""Engines under a trainer's optimizer (DeepSpeed): when they step, and by what they scale the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from gradent.hooks.capture.checkpointing import in_backward

__all__ = ["before_step", "engine_loss_scale"]


def before_step(optimizer: object, call: Callable[[], None]) -> RemovableHandle | None:
    """Call just before the optimizer at the bottom steps, whoever makes it; None where none can be asked."""
    # DeepSpeed steps inside `accelerator.backward`: when a trainer says that a step is coming, it has been made.
    bottom = list(_layers(optimizer))[-1]
    if not isinstance(bottom, torch.optim.Optimizer):
        return None

    def hook(*args: Any) -> None:
        if not in_backward():  # a layer's own step, within the backward: its measured part is not over
            call()

    return bottom.register_step_pre_hook(hook)


def engine_loss_scale(optimizer: object) -> float:
    """What an engine multiplies losses by before their backward (fp16), as it is now: 1 where there is none."""
    for layer in _layers(optimizer):
        scale = getattr(layer, "cur_scale", None)
        if isinstance(scale, (int, float)) and scale > 0:
            return float(scale)
    return 1.0


def _layers(optimizer: object) -> Iterator[object]:
    """An optimizer, and what it wraps: accelerate's wrapper, DeepSpeed's optimizer, the one that steps."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        yield optimizer
        seen.add(id(optimizer))
        optimizer = getattr(optimizer, "optimizer", None)
