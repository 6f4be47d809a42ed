"""What the odd models have in common: embedding, past mean, one odd block, residual, head; and their register.

They are plain modules that take nothing but `input_ids`; between blocks a causal running mean lets positions see
their past.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, WIDTH, HEADS = 97, 16, 4

ODD: dict[str, Callable[[], nn.Module]] = {}
"""Name to class of every odd model; importing tests.odd_models fills it."""


def odd(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(kind: type[nn.Module]) -> type[nn.Module]:
        ODD[name] = kind
        return kind

    return register


def past_mean(x: Tensor) -> Tensor:
    """Mean over the positions up to each one, `[N, T, d]`."""
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    return x.cumsum(1) / count[:, None]


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


class Skeleton(nn.Module):
    """Embedding, past mean, the subclass's `block`, residual, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        return self.head(x + self.block(x + past_mean(x)))

    def block(self, x: Tensor) -> Tensor:
        raise NotImplementedError
