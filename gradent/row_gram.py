"""Inner products between the gradients of any rows: the result of `measure_rows`, and what a step had of its rows.

Letters: N rows, G groups.
"""

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
        products: `⟨g_i, g_j⟩`, float64 `[N, N]`, symmetric; nan between rows whose product was not asked for, or that
            did not meet (rows of different backwards whose gradients had no room to be kept).
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
        weight: `−∂L/∂log π(y_i|x_i)`, float64 `[N]`, L being the loss whose gradient the optimizer gets: positive where
            the loss raises the response (in GRPO the advantage over its normaliser); the mean over its tokens where the
            loss weighs them differently. None of rows that are of no loss.
        moved: source -> float64 `[N]`, nats: first-order change of `log π(y_i|x_i)` in the optimizer's step, by own
            (the row itself), positives and negatives (the other rows of its group that the loss raises or lowers),
            other_groups, earlier_batches, momentum, weight_decay; see `StepAttribution.moved`. None where a step has no
            such account.
        realised: how much `log π(y_i|x_i)` really changed in that step, float64 `[N]`; None unless it was measured.
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
    weight: Tensor | None = None
    moved: Mapping[str, Tensor] | None = None
    realised: Tensor | None = None

    @property
    def cosine(self) -> Tensor:
        """`⟨g_i, g_j⟩ / (‖g_i‖ ‖g_j‖)`, float64 `[N, N]`; nan where it was not asked for or a gradient is zero."""
        norms = self.products.diagonal().sqrt()
        return self.products / torch.outer(norms, norms)

    @property
    def total(self) -> Tensor | None:
        """The first-order change of each row in the step, float64 `[N]`, nats: the sum of `moved`; None without it."""
        return None if self.moved is None else torch.stack(list(self.moved.values())).sum(0)

    @property
    def share(self) -> Tensor | None:
        """Each row's part of the squared norm of the loss's gradient: `⟨w_i g_i, Σ_j w_j g_j⟩ / ‖Σ_j w_j g_j‖²`.

        float64 `[N]`, summing to 1: the row with the largest is what makes `grad_norm` spike. None without weights, and
        where not all products are known. Of rows whose tokens the loss weighs differently, `w_i` is their mean.
        """
        if self.weight is None or not len(self) or bool(self.products.isnan().any()):
            return None
        parts = self.weight * (self.products @ self.weight)
        return parts / parts.sum()

    @property
    def cancellation(self) -> Tensor:
        """`‖Σ w_i g_i‖ / Σ |w_i| ‖g_i‖` of each group, float64 `[G]`: 1 if its rows pull one way, 0 if they cancel.

        In the order of the groups' numbers; nan where not all products of a group are known, or nothing is moved.
        """
        if self.weight is None:
            return torch.zeros(0, dtype=torch.float64)
        found = []
        for rows in self._groups():
            weight, products = self.weight[rows], self.products[rows[:, None], rows]
            size = (weight.abs() * products.diagonal().sqrt()).sum()
            found.append((weight @ products @ weight).clamp_min(0).sqrt() / size)
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)

    @property
    def opposition(self) -> Tensor:
        """Mean cosine of each group's positives with its negatives, float64 `[G]`; nan where there is none."""
        if self.weight is None:
            return torch.zeros(0, dtype=torch.float64)
        found, cosine = [], self.cosine
        for rows in self._groups():
            positive, negative = rows[self.weight[rows] > 0], rows[self.weight[rows] < 0]
            values = cosine[positive[:, None], negative]
            found.append(values[values.isfinite()].mean())
        return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)

    def _groups(self) -> list[Tensor]:
        """The rows of each group, by its number."""
        return [(self.group == number).nonzero()[:, 0] for number in sorted(set(self.group.tolist()))]

    def __len__(self) -> int:
        """Number of rows, N."""
        return int(self.products.shape[0])
