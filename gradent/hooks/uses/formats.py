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
    "Factored",
    "Form",
    "LazyFactored",
    "Materialized",
    "Solid",
    "SparseRows",
    "bytes_scaled",
    "scaled",
    "scaled_gradients",
    "scaled_rows",
    "split_factor",
]


@dataclass(frozen=True)
class Factored:
    """`G = Σ_t u_t v_tᵀ`: a matrix product's gradient, factored. u `[T, O]`, v `[T, I]`."""

    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class SparseRows:
    """`G[ids_t] += values_t`: a lookup's gradient. ids `[T]` int64, values `[T, I]`."""

    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Materialized:
    """The gradient itself, of the slot's shape."""

    grad: Tensor


@dataclass(frozen=True)
class LazyFactored:
    """A `Factored` that is formed when its pair is reduced, and let go of then: too large to be held for every row."""

    make: Callable[[], Factored]


Solid = Factored | SparseRows | Materialized
Form = Solid | LazyFactored


def split_factor(factor: float) -> tuple[float, float]:
    """A finite factor as `(power, rest)`: what a gradient is multiplied by, and what its products are multiplied by."""
    # Any dtype can be multiplied by a power of two without rounding; the rest is of a size between 1/2 and 1.
    if can_wait(factor):
        return 1.0, factor
    rest, exponent = math.frexp(factor)
    return (2.0**exponent, rest) if factor else (0.0, 0.0)


def scaled(form: Form, power: float) -> Form:
    """`power`, a power of two, times the gradient of a form: bfloat16 factors stay bfloat16, others become wide."""
    if power == 1:
        return form
    if isinstance(form, LazyFactored):
        return LazyFactored(lambda: _scaled_dense(form.make(), power))
    if isinstance(form, Factored):
        return _scaled_dense(form, power)
    if isinstance(form, SparseRows):
        return SparseRows(form.ids, form.values.to(accumulator(form.values.dtype)) * power)
    return Materialized(form.grad.to(accumulator(form.grad.dtype)) * power)


def scaled_rows(u: Tensor, v: Tensor, powers: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`scaled` for the factors u `[R, T, O]`, v `[R, T, I]` of all rows; 0 makes a row's gradient zero."""
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
    """`scaled` for the wide gradients `[R, ...]` of all rows; 0 makes a row's gradient zero."""
    return grads if all(power == 1 for power in powers) else _times(grads, powers)


def _times(rows: Tensor, powers: Sequence[float]) -> Tensor:
    dtype = _exact(rows.dtype)
    factors = sent(torch.tensor(powers, dtype=torch.float64).to(dtype), rows.device)
    return rows.to(dtype) * factors.view(-1, *(1,) * (rows.dim() - 1))


def _scaled_dense(form: Factored, power: float) -> Factored:
    u, v = form.u.to(_exact(form.u.dtype)), form.v.to(_exact(form.v.dtype))
    if not _moderate(power):
        one, other = _roots(power)
        return Factored(u * one, v * other)
    return Factored(u * power, form.v) if u.numel() <= v.numel() else Factored(form.u, v * power)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a factor is multiplied: bfloat16 has float32's range, float16 has not."""
    return dtype if dtype == torch.bfloat16 else accumulator(dtype)


def _moderate(power: float) -> bool:
    return 1e-9 < power < 1e9


def _roots(power: float) -> tuple[float, float]:
    """Two powers of two whose product is `power`, none of them near the ends of float32's range."""
    exponent = math.frexp(power)[1] - 1
    return 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
