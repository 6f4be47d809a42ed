"""The result of `measure_rows`: inner products between the gradients of any rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["RowGram"]


@dataclass(frozen=True, kw_only=True)
class RowGram:
    """Inner products of `g_i = ∇_θ log π(y_i|x_i)` for N rows.

    Log-probs are sums over completion tokens (nats), never means, and gradients are those of the sums: nothing is
    divided by the number of rows. All tensors live on the CPU.

    Attributes:
        products: `⟨g_i, g_j⟩`, float64 `[N, N]`, symmetric; nan between rows whose product was not asked for.
        logp: `log π(y_i|x_i)` in nats, float64 `[N]`.
        length: completion tokens of each row, int64 `[N]`.
        group: the group of each row, int64 `[N]`: rows of one prompt share a number.
        along: `⟨g_i, d⟩` with each of the D given directions, float64 `[N, D]`; None where none was given.
        coverage: share of the trainable parameters (by element count) that the products include; 1.0 unless
            `allow_uncovered=True` was asked for.
        modules: `{module name: [N, N]}`, summing to `products`; None unless `by_module=True`. A parameter shared by
            several modules is counted once, under the first of its names.
        modules_along: `{module name: [N, D]}`, summing to `along`; None without directions or `by_module=True`.
        uncovered: `{parameter name: reason}` for what the products leave out; empty when `coverage` is 1.0.
    """

    products: Tensor
    logp: Tensor
    length: Tensor
    group: Tensor
    along: Tensor | None = None
    coverage: float = 1.0
    modules: Mapping[str, Tensor] | None = None
    modules_along: Mapping[str, Tensor] | None = None
    uncovered: Mapping[str, str] = field(default_factory=dict)

    @property
    def cosine(self) -> Tensor:
        """`⟨g_i, g_j⟩ / (‖g_i‖ ‖g_j‖)`, float64 `[N, N]`; nan where it was not asked for or a gradient is zero."""
        norms = self.products.diagonal().sqrt()
        return self.products / torch.outer(norms, norms)

    def __len__(self) -> int:
        """Number of rows, N."""
        return int(self.products.shape[0])
