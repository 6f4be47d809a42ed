"""The few shapes in which one response's gradient of one weight is held until it is reduced.

A *slot* is what a form is the gradient of: a whole parameter, or one expert's matrix of a fused 3-D parameter.
Letters: T tokens, O and I the rows and columns of the slot, in the parameter's own orientation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.kernels.reference import accumulator

__all__ = ["Deferred", "Dense", "Explicit", "Form", "Rows", "Solid", "scaled", "scaled_rows"]


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


@dataclass(frozen=True)
class Deferred:
    """A `Dense` that is formed when its pair is reduced, and let go of then: too large to be held for every row."""

    make: Callable[[], Dense]


Solid = Dense | Rows | Explicit
Form = Solid | Deferred


def scaled(form: Form, factor: float) -> Form:
    """`factor` times the gradient that a form stands for, in the accumulator's dtype.

    Args:
        form: any form.
        factor: not zero, finite.

    Returns:
        The scaled form; of a `Dense`, the smaller operand is copied, or both where one could leave float32's range.
    """
    if isinstance(form, Deferred):
        make = form.make
        return Deferred(lambda: _scaled_dense(make(), factor))
    if isinstance(form, Dense):
        return _scaled_dense(form, factor)
    if isinstance(form, Rows):
        return Rows(form.ids, form.values.to(accumulator(form.values.dtype)) * factor)
    return Explicit(form.grad.to(accumulator(form.grad.dtype)) * factor)


def scaled_rows(u: Tensor, v: Tensor, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`scaled` for the factors of all rows at once.

    Args:
        u: `[R, T, O]`.
        v: `[R, T, I]`.
        factors: of each row; 0 makes a row's gradient zero.

    Returns:
        `(u, v)`, of which one is a copy, or both.
    """
    wide = accumulator(u.dtype)
    sizes = torch.tensor(factors, dtype=torch.float64)
    if not all(1e-9 < abs(factor) < 1e9 for factor in factors if factor):
        roots = sizes.abs().sqrt()
        return _times(u, sizes.sign() * roots, wide), _times(v, roots, wide)
    return (_times(u, sizes, wide), v) if u.shape[2] <= v.shape[2] else (u, _times(v, sizes, wide))


def _times(rows: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype) * factors.to(rows.device, dtype)[:, None, None]


def _scaled_dense(form: Dense, factor: float) -> Dense:
    u, v = form.u, form.v
    wide = accumulator(u.dtype)
    if not 1e-9 < abs(factor) < 1e9:
        root = math.sqrt(abs(factor))
        return Dense(u.to(wide) * math.copysign(root, factor), v.to(wide) * root)
    if u.numel() <= v.numel():
        return Dense(u.to(wide) * factor, v)
    return Dense(u, v.to(wide) * factor)
