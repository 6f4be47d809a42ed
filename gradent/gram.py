"""The result of a measurement: the Gram entries of one gradient per response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["ModuleGram", "PairGram"]

ModuleGram = tuple[Tensor, Tensor, Tensor]
"""`(chosen_sq, rejected_sq, inner)` of one module, each float64 `[B]`."""


@dataclass(frozen=True, kw_only=True)
class PairGram:
    """Gram entries of `g_w = ∇_θ log π(y_w|x)` and `g_l = ∇_θ log π(y_l|x)` for B pairs.

    Log-probs are sums over completion tokens (nats), never means, and gradients are those of the sums: nothing is
    divided by the batch size. All tensors live on the CPU. Source: the paper's Section 3.1, equations (4) and (5).

    Attributes:
        chosen_sq: `‖g_w‖²`, float64 `[B]`.
        rejected_sq: `‖g_l‖²`, float64 `[B]`.
        inner: `⟨g_w, g_l⟩`, float64 `[B]`.
        chosen_logp: `log π(y_w|x)` in nats, float64 `[B]`.
        rejected_logp: `log π(y_l|x)` in nats, float64 `[B]`.
        chosen_len: completion tokens of the chosen response, int64 `[B]`.
        rejected_len: completion tokens of the rejected response, int64 `[B]`.
        coverage: share of the trainable parameters (by element count) that the entries include; 1.0 unless
            `allow_uncovered=True` was asked for.
        modules: `{module name: (chosen_sq, rejected_sq, inner)}`, summing to the totals; None unless `by_module=True`.
            A parameter shared by several modules is counted once, under the first of its names.
        uncovered: `{parameter name: reason}` for what the entries leave out; empty when `coverage` is 1.0.
    """

    chosen_sq: Tensor
    rejected_sq: Tensor
    inner: Tensor
    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    coverage: float = 1.0
    modules: Mapping[str, ModuleGram] | None = None
    uncovered: Mapping[str, str] = field(default_factory=dict)

    @property
    def cosine(self) -> Tensor:
        """`⟨g_w, g_l⟩ / (‖g_w‖ ‖g_l‖)`, float64 `[B]`; nan where a gradient is exactly zero."""
        return self.inner / (self.chosen_sq * self.rejected_sq).sqrt()

    def __len__(self) -> int:
        """Number of pairs, B."""
        return int(self.inner.shape[0])
