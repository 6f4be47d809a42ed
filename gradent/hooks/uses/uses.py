"""One use of a parameter in a forward pass, and how the output gradient that arrives there becomes each row's gradient.

Letters: R rows of the forward, L its padded length, M positions of a row (L, or L times inner axes), I inputs and
O outputs of a matrix product, b the output gradient (of the summed log-probs, at the operator's output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from gradent.hooks.uses.formats import Factored, Form, Materialized, SparseRows
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.parameter_views import View
from gradent.kernels.common.numerics import accumulator

__all__ = ["COPIES", "Cut", "Factor", "GroupedUse", "LookupUse", "MatrixUse", "SumUse", "Use"]

COPIES = 5
"""What a sum over positions holds of each, at most, in wide numbers: b and the operand, the operand's square and norm,
and the product."""

Cut = Callable[[Tensor], Tensor]
"""Takes a part of a tensor of an operator's output shape."""

Factor = Callable[[Cut], Tensor]
"""Makes what b is multiplied by, from those parts of the activations that it is given the cut of."""

_NOTHING = torch.empty(0)


class Use(Protocol):
    """A recorded use: the view of the parameter, and the forms that an output gradient gives."""

    @property
    def without_activations(self) -> Use:
        """The use without the activations that it holds; itself where it holds none."""

    @property
    def view(self) -> View:
        """The operand, as a view of its parameter."""

    @property
    def depth(self) -> int:
        """Leading axes of the parameter that its slots fix: 0 for a whole parameter, 1 for one expert's matrix."""

    def forms(self, grad_output: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """Each row's `(row, slot, form)` of the parameter's gradient, from b, in scratch of `budget` bytes."""


@dataclass(frozen=True)
class _WholeSlot:
    view: View

    @property
    def depth(self) -> int:
        """See `Use`."""
        return len(self.view.slot)

    @property
    def without_activations(self) -> Self:
        """See `Use`."""
        return self


@dataclass(frozen=True)
class MatrixUse(_WholeSlot):
    """`y = x Vᵀ` (or `x V` when `swapped`): `G_V = Σ_t b_t x_tᵀ`."""

    inputs: Tensor
    swapped: bool
    transposed: bool = False
    """Whether the output carries its features on the axis before the last, as in `W @ x`."""

    @property
    def without_activations(self) -> MatrixUse:
        """See `Use`."""
        return MatrixUse(self.view, _NOTHING, self.swapped, self.transposed)

    def oriented(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `[..., I]` and outputs `[..., O]`, in the outputs' dtype, from outputs with any leading axes."""
        inputs = self.inputs
        if self.transposed:
            inputs, outputs = inputs.mT, outputs.mT
        if inputs.dtype != outputs.dtype:  # autocast: the product was taken of the input cast down
            inputs = inputs.to(outputs.dtype)
        return inputs, outputs

    def factors(self, grad_output: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The factors u `[R, M, O]` and v `[R, M, I]` of every row's gradient, `G_r = Σ_m u_{r,m} v_{r,m}ᵀ`."""
        inputs, outputs = self.oriented(grad_output)
        a, b = layout.split(inputs, 1), layout.split(outputs, 1)
        return (a, b) if self.swapped else (b, a)

    def token_factors(self, grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The shared operand `[M, I]` and each token's own `[m, M, O]`, from output gradients `[m, *output shape]`."""
        inputs, outputs = self.oriented(grad_outputs)
        return inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(len(outputs), -1, outputs.shape[-1])

    def forms(self, grad_output: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use`."""
        us, vs = self.factors(grad_output, layout)
        spans = layout.spans if us.shape[1] == layout.length else None
        for row, (u, v) in enumerate(zip(us, vs, strict=True)):
            span = slice(None) if spans is None else slice(*spans[row])
            yield row, self.view.slot, Factored(u[span], v[span])


@dataclass(frozen=True)
class GroupedUse:
    """`torch.nn.functional.grouped_mm`: expert e's rows of x meet expert e's matrix. One row a forward only."""

    view: View
    inputs: Tensor
    ends: Tensor
    depth: int = 1

    @property
    def without_activations(self) -> Self:
        """See `Use`."""
        return replace(self, inputs=_NOTHING)

    def forms(self, grad_output: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use`."""
        start = 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                u, v = self.inputs[start:end], grad_output[start:end]
                yield 0, (expert,), Factored(v, u) if self.view.flipped else Factored(u, v)
            start = end


@dataclass(frozen=True)
class LookupUse(_WholeSlot):
    """`y_t = W[ids_t]`: `G[ids_t] += b_t`."""

    ids: Tensor
    padding_idx: int | None

    def row_ids(self, row: int, layout: Layout) -> Tensor:
        """Token ids that row `row` looks up, int64 `[T]`."""
        return layout.split(self.ids, 0)[row]

    def forms(self, grad_output: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use`."""
        b = layout.split(grad_output, 1)
        for row in range(layout.rows):
            ids, values = self.row_ids(row, layout), b[row]
            if self.padding_idx is not None:
                real = ids != self.padding_idx
                ids, values = ids[real], values[real]
            yield row, self.view.slot, SparseRows(ids, values)


def _dropped(cut: Cut) -> Tensor:
    """The factor of a use without activations."""
    raise AssertionError("a use without activations was asked for its factor")


@dataclass(frozen=True)
class SumUse(_WholeSlot):
    """An elementwise operator, the parameter broadcast: `G = Σ b · factor` over the axes it was broadcast along."""

    shape: torch.Size
    """Shape in which the parameter took part."""
    factor: Factor | None
    """Makes the factor when b arrives, a part at a time; None for 1."""

    @property
    def without_activations(self) -> Self:
        """See `Use`."""
        return self if self.factor is None else replace(self, factor=_dropped)

    def forms(self, grad_output: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use`."""
        ids = self.view.ids
        for row, values in enumerate(self.gradients(grad_output, layout, budget)):
            if ids is None:
                yield row, self.view.slot, Materialized(values)
            else:  # learned positions, added to every row of the batch
                yield row, (), SparseRows(ids.reshape(-1), values)

    def token_sums(self, grad_outputs: Tensor, budget: int) -> Tensor:
        """Gradients `[m, *view]`, wide, of output gradients `[m, *output shape]` of one row's tokens."""
        return self._shaped(self._sums(grad_outputs, lambda tensor: tensor[None], budget))

    def gradients(self, grad_output: Tensor, layout: Layout, budget: int) -> Tensor:
        """Every row's gradient of the slot, `[R, *slot]`, wide; of a lookup, of the rows that `view.ids` names."""
        return self._shaped(self._sums(layout.by_row(grad_output), layout.by_row, budget))

    def _shaped(self, sums: Tensor) -> Tensor:
        """Sums `[R, ...]` as gradients of the slot, or as values of the rows that `view.ids` names."""
        if self.view.ids is not None:
            return sums.reshape(len(sums), -1, self.view.shape[1])
        grads = sums.reshape(len(sums), *self.view.shape)
        return grads if self.view.gain is None else grads * self.view.gain

    def _sums(self, b: Tensor, by_row: Callable[[Tensor], Tensor], budget: int) -> Tensor:
        """`Σ b · factor` of b `[R, ...]` over the axes along which the parameter was broadcast, in steps."""
        wide, dims = accumulator(b.dtype), b.dim() - 1
        operand = (1,) * (dims - len(self.shape)) + tuple(self.shape)[max(0, len(self.shape) - dims) :]
        axes = [axis + 1 for axis, size in enumerate(operand) if size == 1]
        longest = max(axes, key=lambda axis: b.shape[axis], default=1)
        count = b.shape[longest] if dims else 1
        step = count  # of no token (an expert without any), the sum is zero
        if axes and count:
            shape = [1 if axis in axes else size for axis, size in enumerate(b.shape)]
            room = budget - 2 * wide.itemsize * math.prod(shape)  # the sum, and that of a step
            step = max(1, room * count // max(1, COPIES * wide.itemsize * b.numel()))

        def sum_part(part: Cut) -> Tensor:
            """The sum over a part of the positions."""
            terms = part(b).to(wide)
            if self.factor is not None:
                terms = terms * self.factor(lambda tensor: part(by_row(tensor))).to(wide)
            return terms.sum(axes, keepdim=True) if axes else terms

        if step >= count:
            return sum_part(lambda tensor: tensor)
        total = b.new_zeros(shape, dtype=wide)
        for start in range(0, count, step):
            total += sum_part(partial(torch.narrow, dim=longest, start=start, length=min(step, count - start)))
        return total
