"""By what a trainer divides a micro-batch's loss beyond its mean over the rows, read off the loss itself.

The coefficients of a backward hold every factor of the loss, and reproduce `.grad` whatever these are, so neither tells
whether gradient accumulation is among them. The graph of the loss does: its topmost nodes are the scalars that multiply
the mean. Trainers differ in who divides: `training_step` (transformers), `compute_loss` (ms-swift), DeepSpeed's engine,
or nobody (OnlineDPO).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["LossDivision", "scalar_divisors"]

_THROUGH = {"ToCopyBackward0", "ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0", "SqueezeBackward0",
            "SqueezeBackward1", "UnsqueezeBackward0", "CloneBackward0", "AliasBackward0", "AddBackward0"}  # fmt: skip
"""Nodes that leave a scalar's value alone, or add a constant to it."""


class LossDivision:
    """Looks at the loss of the first micro-batch of a step, when the trainer hands it to its accelerator."""

    def __init__(self) -> None:
        self._take_off: Callable[[], None] | None = None
        self._divisors: list[float] | None = None
        self._steps: tuple[int, ...] = ()

    def watch(self, trainer: Any) -> None:
        """Look at the next loss; without an accelerator, `find` does not know."""
        self.forget()
        accelerator = getattr(trainer, "accelerator", None)
        if accelerator is None or "backward" in vars(accelerator):
            return
        backward = accelerator.backward

        def look(loss: Any, *args: Any, **kwargs: Any) -> Any:
            self.step_aside()
            try:
                self._look(trainer, loss, kwargs)
            except Exception:  # noqa: BLE001  (the trainer's backward must go on; `find` then says that nobody saw it)
                self._divisors = None
            return backward(loss, *args, **kwargs)

        accelerator.backward = look
        self._take_off = lambda: vars(accelerator).pop("backward", None)

    def forget(self) -> None:
        """Know nothing of the next step's loss."""
        self.step_aside()
        self._divisors = None

    def step_aside(self) -> None:
        """Give the accelerator its own method back."""
        if self._take_off is not None:
            self._take_off()
            self._take_off = None

    def find(self) -> float | None:
        """What the watched step's loss is divided by: 1, or the number of micro-batches; None where nobody saw it."""
        if self._divisors is None:
            return None
        close = [
            n for n in self._steps if n > 1 and any(math.isclose(n, each, rel_tol=1e-5) for each in self._divisors)
        ]
        return float(close[0]) if close else 1.0

    def _look(self, trainer: Any, loss: Any, kwargs: dict[str, Any]) -> None:
        """Note the divisors of a loss, the trainer's accelerator's and engine's among them."""
        accelerator, whole = trainer.accelerator, int(trainer.args.gradient_accumulation_steps)
        window = getattr(trainer, "current_gradient_accumulation_steps", None) or whole
        self._steps = (int(window), whole)
        divisors = scalar_divisors(loss)
        if divisors is None:
            return
        if getattr(trainer, "is_deepspeed_enabled", False):
            engine: Any = getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
            if kwargs.get("scale_wrt_gas", True) and hasattr(engine, "gradient_accumulation_steps"):
                divisors.append(float(engine.gradient_accumulation_steps()))
        else:
            divisors.append(float(getattr(accelerator, "gradient_accumulation_steps", 1)))
        self._divisors = divisors


def scalar_divisors(loss: Any) -> list[float] | None:
    """What a scalar loss is divided by on its way from its mean (or sum, over the rows); None without a graph."""
    node = loss.grad_fn if isinstance(loss, Tensor) and loss.numel() == 1 else None
    if node is None:
        return None
    divisors = list[float]()
    while True:
        name, children = node.name(), [child for child, _ in node.next_functions if child is not None]
        if name in ("DivBackward0", "MulBackward0"):
            value = _constant(node)
            if value is not None and len(children) == 1:
                divisors.append(value if name == "DivBackward0" else 1 / value if value else math.inf)
        elif name == "SumBackward0":  # `losses.sum() / (rows * steps)`
            count = math.prod(getattr(node, "_saved_self_sym_sizes", ()))
            return [math.prod(divisors) / count] if count else None
        elif name not in _THROUGH:
            return divisors
        if len(children) != 1:
            return divisors
        node = children[0]


def _constant(node: Node) -> float | None:
    """The number that a scalar is multiplied with or divided by; None where it is not saved."""
    for name in ("_saved_other", "_saved_self"):
        saved = getattr(node, name, None)
        if isinstance(saved, Tensor) and saved.numel() == 1 and not saved.requires_grad:
            with torch.no_grad():
                return float(saved)
    return None
