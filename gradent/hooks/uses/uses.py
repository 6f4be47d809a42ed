"""One use of a parameter in a forward pass, and how the cotangent that arrives there becomes each row's gradient.

Letters: R rows of the forward, L its padded length, M positions of a row (L, or L times inner axes), I inputs and
O outputs of a matrix product, b the cotangent (gradient of the summed log-probs at the operator's output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from gradent.hooks.uses.formats import Factored, Form, Materialized, SparseRows
from gradent.hooks.uses.parameter_views import View
from gradent.kernels.common.numerics import accumulator

__all__ = ["COPIES", "Cut", "Factor", "GroupedUse", "Layout", "LookupUse", "MatrixUse", "SumUse", "Use"]

COPIES = 5
"""What a sum over positions holds of each, at most, in wide numbers: the cotangent and the operand, widened, the square
and the norm of that, and the product."""

Cut = Callable[[Tensor], Tensor]
"""Takes a part of a tensor of an operator's output shape."""

Factor = Callable[[Cut], Tensor]
"""Makes what a cotangent is multiplied by, of those parts of the activations that it is given the cut of."""

_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Layout:
    """The shape of one forward: `rows` R, padded to `length` L tokens.

    Attributes:
        rows: R.
        length: L.
        look: finds the `spans`, when they are first wanted; None where they cannot be known.
        certain: whether what is found is so, and not yet to be confirmed when the backward is over.
    """

    rows: int
    length: int
    look: Callable[[], Sequence[tuple[int, int]] | None] | None = field(default=None, compare=False)
    certain: bool = True

    @cached_property
    def spans(self) -> Sequence[tuple[int, int]] | None:
        """Of each row, the first position whose cotangent may be other than zero, and the one after the last."""
        return None if self.look is None else self.look()

    @property
    def ends(self) -> list[int] | None:
        """Of each row, the position from which its cotangents are zero; None too where rows do not begin at once."""
        spans = self.spans
        return None if spans is None or any(start for start, _ in spans) else [stop for _, stop in spans]

    def splits(self, tensor: Tensor, features: int) -> bool:
        """Whether the rows of a tensor of the pass can be told apart.

        They can where R is 1, where the leading axes are `[R, M]`, or where the leading axis is R·L, flattened tokens.
        A single leading axis of R is more likely R tokens than one token of every row, and is not taken for rows.

        Args:
            tensor: an operator's operand or result.
            features: trailing axes that are features.

        Returns:
            What `split` needs to be true.
        """
        if self.rows == 1:
            return tensor.dim() >= features
        if tensor.dim() == features + 1:
            return tensor.shape[0] == self.rows * self.length
        return tensor.dim() > features + 1 and tensor.shape[0] == self.rows

    def split(self, tensor: Tensor, features: int) -> Tensor:
        """View a tensor of the pass as `[R, M, *feature axes]`.

        Args:
            tensor: an operator's operand or result for which `splits` is true.
            features: trailing axes that are features.

        Returns:
            The view (a copy where the strides do not allow one).
        """
        return tensor.reshape(self.rows, -1, *tensor.shape[tensor.dim() - features :])


class Use(Protocol):
    """A recorded use: the view of the parameter, and the forms that a cotangent gives."""

    @property
    def hollow(self) -> Use:
        """The use without the activations that it holds; itself where it holds none."""
        ...

    @property
    def view(self) -> View:
        """The operand, as a view of its parameter."""
        ...

    @property
    def depth(self) -> int:
        """Leading axes of the parameter that its slots fix: 0 for a whole parameter, 1 for one expert's matrix."""
        ...

    def forms(self, cotangent: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """Each row's share of the parameter's gradient.

        Args:
            cotangent: b, of the operator's output shape.
            layout: the forward's rows.
            budget: bytes of scratch that forming a product may take.

        Yields:
            `(row, slot, form)`.
        """
        ...


@dataclass(frozen=True)
class _WholeSlot:
    view: View

    @property
    def depth(self) -> int:
        return len(self.view.slot)

    @property
    def hollow(self) -> Self:
        """See `Use.hollow`."""
        return self


@dataclass(frozen=True)
class MatrixUse(_WholeSlot):
    """`y = x Vᵀ` (or `x V` when `swapped`): `G_V = Σ_t b_t x_tᵀ`."""

    inputs: Tensor
    swapped: bool
    transposed: bool = False
    """Whether the output carries its features on the axis before the last, as in `W @ x`."""

    @property
    def hollow(self) -> MatrixUse:
        """See `Use.hollow`."""
        return MatrixUse(self.view, _NOTHING, self.swapped, self.transposed)

    def oriented(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output with their features on the last axis, in the output's dtype.

        Args:
            outputs: of the operator's output shape, further axes in front allowed.

        Returns:
            `(inputs [..., I], outputs [..., O])`.
        """
        inputs = self.inputs
        if self.transposed:
            inputs, outputs = inputs.mT, outputs.mT
        if inputs.dtype != outputs.dtype:  # autocast: the product was taken of the input cast down
            inputs = inputs.to(outputs.dtype)
        return inputs, outputs

    def factors(self, cotangent: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The factors of every row's gradient, `u [R, M, rows of the slot]` and `v [R, M, its columns]`.

        Args:
            cotangent: b, of the operator's output shape.
            layout: the forward's rows.

        Returns:
            `(u, v)`, with `G_r = Σ_m u_{r,m} v_{r,m}ᵀ`.
        """
        inputs, outputs = self.oriented(cotangent)
        a, b = layout.split(inputs, 1), layout.split(outputs, 1)
        return (a, b) if self.swapped else (b, a)

    def token_factors(self, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the gradients of many cotangents of one row.

        Args:
            cotangents: `[m, *shape of the output]`.

        Returns:
            `(a [M, I], b [m, M, O])`: the operand that all share, and each one's own factor.
        """
        inputs, outputs = self.oriented(cotangents)
        return inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(len(outputs), -1, outputs.shape[-1])

    def forms(self, cotangent: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use.forms`."""
        us, vs = self.factors(cotangent, layout)
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
    def hollow(self) -> Self:
        """See `Use.hollow`."""
        return replace(self, inputs=_NOTHING)

    def forms(self, cotangent: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use.forms`."""
        start = 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                u, v = self.inputs[start:end], cotangent[start:end]
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

    def forms(self, cotangent: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use.forms`."""
        b = layout.split(cotangent, 1)
        for row in range(layout.rows):
            ids, values = self.row_ids(row, layout), b[row]
            if self.padding_idx is not None:
                real = ids != self.padding_idx
                ids, values = ids[real], values[real]
            yield row, self.view.slot, SparseRows(ids, values)


def _gone(cut: Cut) -> Tensor:
    """The factor of a hollow use."""
    raise AssertionError("a hollow use was asked for its factor")


@dataclass(frozen=True)
class SumUse(_WholeSlot):
    """An elementwise operator, the parameter broadcast: `G = Σ b · factor` over the axes it was broadcast along."""

    shape: torch.Size
    """Shape in which the parameter took part."""
    factor: Factor | None
    """Makes the factor when the cotangent arrives, a part at a time; None for 1."""

    @property
    def hollow(self) -> Self:
        """See `Use.hollow`."""
        return self if self.factor is None else replace(self, factor=_gone)

    def forms(self, cotangent: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use.forms`."""
        if self.view.ids is None:
            for row, grad in enumerate(self.gradients(cotangent, layout, budget)):
                yield row, self.view.slot, Materialized(grad)
            return
        # Learned positions, added to every row of the batch.
        for row, summed in enumerate(self._summed(cotangent, layout, budget)):
            yield row, (), SparseRows(self.view.ids.reshape(-1), summed.reshape(-1, self.view.shape[1]))

    def gradients(self, cotangent: Tensor, layout: Layout, budget: int) -> Tensor:
        """Every row's gradient of the slot, where it is no lookup (`view.ids`).

        Args:
            cotangent: b, of the operator's output shape.
            layout: the forward's rows.
            budget: bytes of scratch that forming a product may take.

        Returns:
            `[R, *shape of the slot]`, in the accumulator's dtype.
        """
        grads = self._summed(cotangent, layout, budget).reshape(layout.rows, *self.view.shape)
        return grads if self.view.gain is None else grads * self.view.gain

    def _summed(self, cotangent: Tensor, layout: Layout, budget: int) -> Tensor:
        """`Σ b · factor` of every row `[R, ...]` over the axes along which the parameter was broadcast, in steps."""
        b = self._by_row(cotangent, layout)
        wide, dims = accumulator(b.dtype), b.dim() - 1
        axes = self._summed_axes(dims)
        longest = max(axes, key=lambda axis: b.shape[axis], default=1)
        count = b.shape[longest] if dims else 1
        step = count  # of no token (an expert without any), the sum is zero
        if axes and count:
            shape = [1 if axis in axes else size for axis, size in enumerate(b.shape)]
            room = budget - 2 * wide.itemsize * math.prod(shape)  # the sum, and that of a step
            step = max(1, room * count // max(1, COPIES * wide.itemsize * b.numel()))

        def summed(part: Cut) -> Tensor:
            """Of a part of the positions."""
            terms = part(b).to(wide)
            if self.factor is not None:
                terms = terms * self.factor(lambda tensor: part(self._by_row(tensor, layout))).to(wide)
            return terms.sum(axes, keepdim=True) if axes else terms

        if step >= count:
            return summed(_whole)
        total = b.new_zeros(shape, dtype=wide)
        for start in range(0, count, step):
            total += summed(partial(_narrow, axis=longest, start=start, stop=min(count, start + step)))
        return total

    def _summed_axes(self, dims: int) -> list[int]:
        """The axes, of rows of `dims` axes behind that of the rows, along which the parameter was broadcast."""
        shape = (1,) * (dims - len(self.shape)) + tuple(self.shape)[max(0, len(self.shape) - dims) :]
        return [axis + 1 for axis, size in enumerate(shape) if size == 1]

    def _by_row(self, tensor: Tensor, layout: Layout) -> Tensor:
        """A tensor of the output's shape as `[R, *shape of a row]`."""
        if layout.rows == 1:
            return tensor[None]
        if tensor.shape[0] == layout.rows:
            return tensor
        return tensor.reshape(layout.rows, layout.length, *tensor.shape[1:])

    def token_sums(self, cotangents: Tensor, budget: int) -> Tensor:
        """The gradients of many cotangents of one row.

        Args:
            cotangents: `[m, *shape of the output]`.
            budget: bytes of scratch.

        Returns:
            `[m, *shape of the view]`, wide; of learned positions, the values of the rows that `view.ids` names.
        """
        wide = accumulator(cotangents.dtype)
        factor = None if self.factor is None else self.factor(_whole).to(wide)
        axes = self._summed_axes(cotangents.dim() - 1)
        step = max(1, budget // max(1, 2 * wide.itemsize * cotangents.shape[1:].numel()))
        parts = []
        for start in range(0, len(cotangents), step):
            part = cotangents[start : start + step].to(wide)
            if factor is not None:
                part = part * factor
            parts.append(part.sum(axes) if axes else part)
        if self.view.ids is not None:
            return torch.cat(parts).reshape(len(cotangents), -1, self.view.shape[1])
        grads = torch.cat(parts).reshape(len(cotangents), *self.view.shape)
        return grads if self.view.gain is None else grads * self.view.gain


def _whole(tensor: Tensor) -> Tensor:
    """All of it."""
    return tensor


def _narrow(tensor: Tensor, axis: int, start: int, stop: int) -> Tensor:
    """A part of it along one axis."""
    return tensor.narrow(axis, start, stop - start)
