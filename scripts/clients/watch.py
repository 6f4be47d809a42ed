"""What a trainer really did in each step: the weights before it, the rows that the model saw, its gradients."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import gradent

__all__ = ["Step", "Watch", "watch_runs"]


@dataclass
class Step:
    """One step of the optimizer."""

    weights: dict[str, Tensor]
    rows: list[Tensor] = field(default_factory=list)  # input_ids of every forward with gradients
    grads: dict[str, Tensor] = field(default_factory=dict)


class Watch(TrainerCallback):
    """Notes the steps of the next training."""

    found: Watch
    """The one of this process."""

    def __init__(self) -> None:
        self.steps: dict[int, Step] = {}
        self.model: nn.Module | None = None
        self.trainer: Any = None
        self.callbacks: list[gradent.EntanglementCallback] = []
        self._rows: list[Tensor] = []
        self._now: Step | None = None
        self._handle: Any = None

    def follow(self, model: nn.Module) -> None:
        """Keep a copy in float64 for the truth, and look at the model's forwards."""
        self._raw = model
        self.model = copy.deepcopy(model).double().eval()
        if hasattr(self.model, "gradient_checkpointing_disable"):
            self.model.gradient_checkpointing_disable()
        self._handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is not None:
                self._rows.append(ids.detach().clone())

    def take_rows(self) -> list[Tensor]:
        """`input_ids` of the forwards with gradients since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: part for name, part in self._raw.named_parameters() if part.requires_grad}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Follow the trainer's model."""
        self.follow(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights."""
        self._now = Step({name: part.detach().clone() for name, part in self.trained().items()})
        self.take_rows()
        self.steps[state.global_step + 1] = self._now

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the gradients."""
        assert self._now is not None
        self._now.rows = self.take_rows()
        self._now.grads = {
            name: torch.zeros_like(part) if part.grad is None else part.grad.detach().clone()
            for name, part in self.trained().items()
        }

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model."""
        self._handle.remove()


def watch_runs() -> Watch:
    """Have the trainers and callbacks of this process noted, however a program makes them.

    Returns:
        What notes them.
    """
    watch = Watch.found = Watch()
    make, train = gradent.EntanglementCallback.__init__, Trainer.train

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        watch.callbacks.append(self)

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.trainer = self
        self.add_callback(watch)
        return train(self, *args, **kwargs)

    gradent.EntanglementCallback.__init__ = noted  # type: ignore[method-assign]
    Trainer.train = watched  # type: ignore[method-assign]
    return watch
