"""The few shapes in which one response's gradient of one weight is held until it is reduced.

A *slot* is what a form is the gradient of: a whole parameter, or one expert's matrix of a fused 3-D parameter.
Letters: T tokens, O and I the rows and columns of the slot, in the parameter's own orientation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Dense", "Explicit", "Form", "Rows"]


@dataclass(frozen=True)
class Dense:
    """`G = Σ_t u_t v_tᵀ`: a matrix product's gradient, factored. u `[T, O]`, v `[T, I]`."""

    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class Rows:
    """`G[ids_t] += values_t`: a lookup's gradient. ids `[T]` int64, values `[T, I]`."""

    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Explicit:
    """The gradient itself, of the slot's shape."""

    grad: Tensor


Form = Dense | Rows | Explicit
