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

from gradent.kernels.common.cost import can_wait
from gradent.kernels.common.numerics import accumulator
from gradent.kernels.common.streams import sent

__all__ = [
    "Deferred",
    "Dense",
    "Explicit",
    "Form",
    "Rows",
    "Solid",
    "bytes_scaled",
    "scaled",
    "scaled_gradients",
    "scaled_rows",
    "split_factor",
]


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


def split_factor(factor: float) -> tuple[float, float]:
    """What a gradient is multiplied by before products of it are formed, and what its products are multiplied by.

    Args:
        factor: finite.

    Returns:
        `(power, rest)`, `power · rest` the factor: a power of two, by which any dtype can be multiplied without
        rounding, and a rest of a size between 1/2 and 1; `(1, factor)` where the factor `can_wait`, `(0, 0)`
        of 0.
    """
    if can_wait(factor):
        return 1.0, factor
    rest, exponent = math.frexp(factor)
    return (2.0**exponent, rest) if factor else (0.0, 0.0)


def scaled(form: Form, power: float) -> Form:
    """`power` times the gradient that a form stands for. bfloat16 factors stay as they are, others become wide.

    Args:
        form: any form.
        power: a power of two.

    Returns:
        The scaled form, itself for 1; of a `Dense`, the smaller operand is copied, or both where one could leave
        float32's range.
    """
    if power == 1:
        return form
    if isinstance(form, Deferred):
        make = form.make
        return Deferred(lambda: _scaled_dense(make(), power))
    if isinstance(form, Dense):
        return _scaled_dense(form, power)
    if isinstance(form, Rows):
        return Rows(form.ids, form.values.to(accumulator(form.values.dtype)) * power)
    return Explicit(form.grad.to(accumulator(form.grad.dtype)) * power)


def scaled_rows(u: Tensor, v: Tensor, powers: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`scaled` for the factors of all rows at once.

    Args:
        u: `[R, T, O]`.
        v: `[R, T, I]`.
        powers: of each row, a power of two; 0 makes a row's gradient zero.

    Returns:
        `(u, v)`, of which one is a copy, or both; themselves where all powers are 1.
    """
    of_u, of_v = _shares(u, v, powers)
    return u if of_u is None else _times(u, of_u), v if of_v is None else _times(v, of_v)


def bytes_scaled(u: Tensor, v: Tensor, powers: Sequence[float]) -> int:
    """Bytes of what `scaled_rows` copies, of the same arguments; 0 where all powers are 1."""
    shares = zip((u, v), _shares(u, v, powers), strict=True)
    return sum(rows.numel() * _exact(rows.dtype).itemsize for rows, share in shares if share is not None)


def _shares(u: Tensor, v: Tensor, powers: Sequence[float]) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """What each factor's rows are multiplied by; None for a factor that stays as it is."""
    if all(power == 1 for power in powers):
        return None, None
    if not all(map(_moderate, filter(None, powers))):
        roots = [_roots(power) if power else (0.0, 0.0) for power in powers]
        return [root for root, _ in roots], [root for _, root in roots]
    return (powers, None) if u.shape[2] <= v.shape[2] else (None, powers)


def scaled_gradients(grads: Tensor, powers: Sequence[float]) -> Tensor:
    """`scaled` for the gradients of all rows at once.

    Args:
        grads: `[R, ...]`, wide.
        powers: of each row, a power of two; 0 makes a row's gradient zero.

    Returns:
        Of the same shape: a copy, or itself where all powers are 1.
    """
    if all(power == 1 for power in powers):
        return grads
    return _times(grads, powers)


def _times(rows: Tensor, powers: Sequence[float]) -> Tensor:
    dtype = _exact(rows.dtype)
    factors = sent(torch.tensor(powers, dtype=torch.float64).to(dtype), rows.device)
    return rows.to(dtype) * factors.view(-1, *(1,) * (rows.dim() - 1))


def _scaled_dense(form: Dense, power: float) -> Dense:
    u, v = form.u.to(_exact(form.u.dtype)), form.v.to(_exact(form.v.dtype))
    if not _moderate(power):
        one, other = _roots(power)
        return Dense(u * one, v * other)
    return Dense(u * power, form.v) if u.numel() <= v.numel() else Dense(form.u, v * power)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a factor is multiplied: bfloat16 has float32's range, float16 has not."""
    return dtype if dtype == torch.bfloat16 else accumulator(dtype)


def _moderate(power: float) -> bool:
    return 1e-9 < power < 1e9


def _roots(power: float) -> tuple[float, float]:
    """Two powers of two whose product is `power`, none of them near the ends of float32's range."""
    exponent = math.frexp(power)[1] - 1
    return 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
