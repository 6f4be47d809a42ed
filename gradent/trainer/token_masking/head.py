"""The head that scores response tokens, its part of an optimizer step, and its file.

A token's score `u^i` depends on `(x, y^{<i})` alone: it is read off the hidden state that predicts the token. The head
is no part of the model. The model is saved, measured and clipped as it would be without, and so a run on several ranks
has to average the head's gradients itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm
from transformers import TrainerCallback

from gradent.errors import InputError
from gradent.record.atomic import write_whole

__all__ = ["HEAD_FILE", "HeadUpdate", "MaskHead", "load_head", "reduce_gradients", "save_head"]

HEAD_FILE = "mask_head.safetensors"
"""Name of the head's weights beside a model's or an adapter's."""


class MaskHead(nn.Module):
    """Scores of tokens from hidden states, in float32 whatever the model is in.

    `u = w·x/√n + b` with x the hidden state normalised to mean 0 and variance 1 (n wide), or a hidden layer on it. So a
    learning rate does not depend on how large a model's hidden states are. It starts with w = 0: all tokens have the
    score b (`start`). No random number of the global generators is used.
    """

    def __init__(self, width: int, *, hidden: int = 0, start: float, seed: int = 0) -> None:
        super().__init__()
        with torch.device("meta"):  # where drawing first values draws nothing
            self.inner = nn.Linear(width, hidden) if hidden else None
            self.outer = nn.Linear(hidden or width, 1)
        self.to_empty(device="cpu")
        with torch.no_grad():
            if self.inner is not None:
                draw, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(width)
                for parameter in self.inner.parameters():
                    parameter.uniform_(-bound, bound, generator=draw)
            self.outer.weight.zero_()
            self.outer.bias.fill_(start)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores, float32 `[...]`, of hidden states `[..., width]`."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = layer_norm(hidden.to(self.outer.weight.dtype), hidden.shape[-1:])
            if self.inner is not None:
                x = gelu(self.inner(x))
            scores: Tensor = self.outer(x / math.sqrt(x.shape[-1])).squeeze(-1)
        return scores


def reduce_gradients(head: MaskHead, accelerator: Any) -> None:
    """Average the head's gradients over all ranks, in place, in one message."""
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if accelerator.num_processes == 1 or not parameters:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mean = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), reduction="mean")
    for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


class HeadUpdate(TrainerCallback):
    """Clips the head's gradients by themselves, to `max_grad_norm`, and drops them after a step."""

    def __init__(self, head: MaskHead, accelerator: Any) -> None:
        self._head, self._accelerator = head, accelerator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start without gradients, and with the same weights on all ranks."""
        self._head.zero_grad()
        if self._accelerator.num_processes > 1:
            with torch.no_grad():
                for parameter in self._head.parameters():
                    is_source = self._accelerator.is_main_process
                    parameter.copy_(self._accelerator.reduce(parameter if is_source else torch.zeros_like(parameter)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clip."""
        if args.max_grad_norm and args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._head.parameters(), args.max_grad_norm)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the step's gradients."""
        self._head.zero_grad()


def save_head(head: MaskHead, directory: str | os.PathLike[str], facts: Mapping[str, str]) -> Path:
    """Write the head's weights beside a model, whole or not at all, with `facts` as the file's metadata."""
    path = Path(directory) / HEAD_FILE
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    content = save(state, metadata={"format": "pt", **facts})
    write_whole(path, lambda handle: handle.write(content))
    return path


def load_head(head: MaskHead, directory: str | os.PathLike[str]) -> None:
    """Read the head's weights from a checkpoint, in place; an `InputError` where it holds none that fit."""
    path = Path(directory) / HEAD_FILE
    if not path.is_file():
        raise InputError(
            f"{directory}: no {HEAD_FILE} in this checkpoint, so it is of a run without token masking. Resume from a "
            "checkpoint of TokenMaskedDPOTrainer, or start anew with this one as the model."
        )
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Resume from another checkpoint.") from error
    saved, needed = ({name: list(value.shape) for name, value in part.items()} for part in (state, head.state_dict()))
    if saved != needed:
        raise InputError(
            f"{path}: holds {saved}, and this run's head is {needed}. Resume with the model and the mask_hidden of the "
            "run that saved it."
        )
    head.load_state_dict(state)
