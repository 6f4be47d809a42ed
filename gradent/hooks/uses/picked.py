"""Uses by tokens that a mixture of experts has picked: each token says which row it is of, and which expert it meets.

Letters: R rows of the forward, n picked tokens, E experts, I inputs and O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradent.hooks.uses.formats import Factored, Form, Materialized, SparseRows
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.parameter_views import View
from gradent.hooks.uses.uses import Factor, Use
from gradent.kernels.common.numerics import accumulator

__all__ = ["PickedUse", "picked_sum"]

_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class PickedUse:
    """Each of n tokens meets one matrix: that of the view, or of its expert. `G_{row, expert} = Σ_t b_t x_tᵀ`."""

    view: View
    inputs: Tensor
    rows: Tensor  # int64 [n], -1 for none
    swapped: bool  # the parameter is [..., I, O]
    experts: Tensor | None = None  # int64 [n]
    ends: Tensor | None = None  # or, of tokens sorted by expert, where each expert's end

    @property
    def depth(self) -> int:
        """See `Use`."""
        return 0 if len(self.view.shape) == 2 and not self.view.slot else 1

    @property
    def without_activations(self) -> PickedUse:
        """See `Use`."""
        return replace(self, inputs=_NOTHING, rows=_NOTHING, experts=None, ends=None)

    def forms(self, grad_output: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use`."""
        inputs, outputs = self.inputs.reshape(-1, self.inputs.shape[-1]), grad_output.reshape(len(self.rows), -1)
        if inputs.dtype != outputs.dtype:
            inputs = inputs.to(outputs.dtype)
        segments, order = self.sorted(inputs, outputs, layout.rows)
        inputs, outputs = inputs[order], outputs[order]
        start = 0
        for key, count in segments:
            expert, row = divmod(key, layout.rows)
            x, b = inputs[start : start + count], outputs[start : start + count]
            start += count
            yield row, self._slot(expert), Factored(x, b) if self.swapped else Factored(b, x)

    def _slot(self, expert: int) -> tuple[int, ...]:
        return self.view.slot if self.experts is None and self.ends is None else (expert,)

    def sorted(self, inputs: Tensor, outputs: Tensor, rows: int) -> tuple[list[tuple[int, int]], Tensor]:
        """`(expert · R + row, tokens)` of each expert and row that has any, and the tokens in that order."""
        keys, experts = self.rows, self.experts
        if self.ends is not None:
            places = torch.arange(len(keys), device=keys.device)
            experts = torch.searchsorted(self.ends.long(), places, right=True)
            # Tokens behind the last expert's meet none.
            keys = torch.where(places < self.ends[-1], keys, -1)
        if experts is not None:
            keys = torch.where(keys < 0, -1, experts * rows + keys)
        # Padding has no output gradient, and what the router keeps from an expert can be zero on its way in.
        keys = keys.clone()
        keys[_zero_rows(outputs)] = -1
        keys[_zero_rows(inputs)] = -1
        values, order = torch.sort(keys, stable=True)
        dead = int((values < 0).sum())
        values, order = values[dead:], order[dead:]
        found, counts = torch.unique_consecutive(values, return_counts=True)
        return list(zip(found.tolist(), counts.tolist(), strict=True)), order


def _zero_rows(values: Tensor) -> Tensor:
    """Numbers of the rows of `[n, features]` that are zero, int64."""
    suspects = (values[:, 0] == 0).nonzero()[:, 0]
    return suspects[(values[suspects] == 0).all(1)] if len(suspects) else suspects


@dataclass(frozen=True)
class _PickedSum:
    """A parameter that was broadcast over n tokens: `G_row = Σ_t b · factor`."""

    view: View
    shape: tuple[int, ...]  # in which it took part, without the tokens' axis
    factor: Factor | None
    rows: Tensor

    @property
    def depth(self) -> int:
        """See `Use`."""
        return len(self.view.slot)

    @property
    def without_activations(self) -> _PickedSum:
        """See `Use`."""
        return replace(self, factor=None, rows=_NOTHING)

    def forms(self, grad_output: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use`."""
        terms = self._terms(grad_output)
        if self.view.ids is not None:  # every token has a bias of its expert
            for row in range(layout.rows):
                mine = (self.rows == row).nonzero()[:, 0]
                yield row, (), SparseRows(self.view.ids[mine], terms[mine])
            return
        sums = terms.new_zeros(layout.rows + 1, *terms.shape[1:])
        sums.index_add_(0, self.rows.where(self.rows >= 0, layout.rows), terms)
        axes = [axis + 1 for axis, size in enumerate(self.shape) if size == 1]
        for row, values in enumerate(sums[: layout.rows].sum(axes, keepdim=True) if axes else sums[: layout.rows]):
            grad = values.reshape(self.view.shape)
            yield row, self.view.slot, Materialized(grad if self.view.gain is None else grad * self.view.gain)

    def _terms(self, b: Tensor) -> Tensor:
        terms = b.to(accumulator(b.dtype))
        return terms if self.factor is None else terms * self.factor(lambda tensor: tensor).to(terms.dtype)


def picked_sum(view: View, operand: Tensor, factor: Factor | None, rows: Tensor) -> list[Use]:
    """The use of an operand by picked tokens `[n, features]`: broadcast, or looked up for each; none if unclear."""
    if view.ids is not None:
        is_bias = len(view.shape) == 2 and operand.dim() == 2 and len(operand) == len(rows) and factor is None
        return [_PickedSum(view, (), None, rows)] if is_bias else []
    if operand.dim() > 1 and operand.shape[0] != 1:
        return []
    return [_PickedSum(view, tuple(operand.shape[operand.dim() - 1 :]), factor, rows)]
