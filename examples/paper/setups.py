"""The models that Theorems 1 and 3 and Corollary 2 are about, small and in float64.

Letters: N rows, V vocabulary, d width, L tokens a row.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

__all__ = ["F64", "WIDTH", "LearnableHead", "LearnableLogits", "V"]

V, WIDTH = 12, 5
F64 = torch.float64
_IMPOSSIBLE = -2000.0  # a logit whose softmax is 0 in float64


class LearnableHead(nn.Module):
    """Model Setup 1: frozen hidden states that depend on the prefix, a learnable last linear layer without bias.

    Args:
        seed: of all weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(V, WIDTH, generator=draw, dtype=F64), freeze=True)
        self.lm_head = nn.Linear(WIDTH, V, bias=False, dtype=F64)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.randn(V, WIDTH, generator=draw, dtype=F64))

    def hidden(self, input_ids: Tensor) -> Tensor:
        """States `[N, L, d]` of token ids `[N, L]`."""
        decay = 0.5 ** torch.arange(input_ids.shape[1], dtype=F64)
        return torch.tanh((self.embedding(input_ids) * decay[:, None]).cumsum(1))

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        """Logits `[N, L, V]` of token ids `[N, L]`."""
        return SimpleNamespace(logits=self.lm_head(self.hidden(input_ids)))

    def predict_uniformly(self, prefix: list[int], support: list[int]) -> None:
        """Make the token behind `prefix` uniform over `support`, every other token impossible."""
        state = self.hidden(torch.tensor([prefix]))[0, -1]
        wanted = torch.full((V,), _IMPOSSIBLE, dtype=F64)
        wanted[support] = 0.0
        with torch.no_grad():
            weight = self.lm_head.weight
            weight += torch.outer(wanted - weight @ state, state) / (state @ state)


class LearnableLogits(nn.Module):
    """Model Setup 2: one learnable row of logits a position; what depends on the prefix is frozen.

    Args:
        length: positions.
        seed: of all weights.
    """

    def __init__(self, length: int, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.rows = nn.Parameter(torch.randn(length, V, generator=draw, dtype=F64))
        self.register_buffer("table", torch.randn(V, V, generator=draw, dtype=F64))

    def context(self, input_ids: Tensor) -> Tensor:
        """The frozen part of the logits, `[N, L, V]`, of token ids `[N, L]`."""
        return self.table[input_ids].cumsum(1)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        """Logits `[N, L, V]` of token ids `[N, L]`."""
        return SimpleNamespace(logits=self.rows[: input_ids.shape[1]] + self.context(input_ids))
