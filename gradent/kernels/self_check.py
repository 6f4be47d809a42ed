"""Whether the kernels are right on this device, with this driver and this Triton: asked once before they are used.

Kernels have been seen to return zeros on some versions, and a wrong entry looks like any other. So each kernel runs on
small operands of odd sizes, at its smallest and its largest tile, against float64 in plain torch; and in 16 bits, as a
model's layers are, on larger ones whose sizes are multiples of 8: several tiles, loads that run ahead of the products.
Padding, and what the kernels are to write, is nan. An error is scaled by `‖G_i‖‖G_j‖` (of the stored gradient by its
own norm) and may be `TOLERANCE · √T` with T the longest row; a zero gradient must give exactly 0.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from gradent.kernels.common.tiles import gram_configs, group_configs, is_deep, outer_configs, plan_groups
from gradent.kernels.common.triton_operands import Groups, Spans, couples
from gradent.kernels.gram.triton import gram_entries, gram_products
from gradent.kernels.outer.triton import outer_entries, outer_products, outer_with_gradient

__all__ = ["BROKEN", "TOLERANCE", "self_check"]

TOLERANCE = 5e-7
"""Largest scaled error of float32 accumulation, times √T: see `self_check`."""

BROKEN = (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError, triton.TritonError)
"""What Triton raises where it cannot compile or launch: its own errors; no C compiler, driver or headers."""

DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a case, and the places of the configurations that run it."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    rows: int
    cols: int
    configs: tuple[int, ...]

    @property
    def longest(self) -> int:
        """T."""
        return max(*self.chosen, *self.rejected)


ODD = Shape((17, 0, 70), (3, 41, 1), 19, 45, configs=(0, -1))
EVEN = Shape((401, 0, 17), (3, 390, 1), 264, 392, configs=(-1,))
"""As large as it takes for three steps of the largest tiles along T, O and I, and for tiles that lie side by side."""


@dataclass(frozen=True)
class Case:
    """Operands and what must come out."""

    factors: tuple[Tensor, Tensor, Tensor, Tensor]  # `(u_w, v_w, u_l, v_l)`, nan between the spans
    spans: Spans  # three ragged pairs, one without chosen tokens
    weight: Tensor  # `[O, I]` float32
    coefficients: Tensor  # `[k, 2]` float32
    gradients: Tensor  # `[2, k, O, I]` float64


def self_check(device: torch.device | str) -> str:
    """What is wrong with the kernels on a CUDA device (or the CPU, under Triton's interpreter); "" if all is right."""
    try:
        for u, v in DTYPES:
            for shape in (ODD, EVEN) if u.itemsize == v.itemsize == 2 else (ODD,):
                case, limit = _case(torch.device(device), u, v, shape), TOLERANCE * shape.longest**0.5
                for name, run in _runs(case, u if u == v else torch.float32, shape.configs):
                    error = run()
                    if not error <= limit:
                        return f"{name} is off by {error:.1e} on {u} and {v}, where {limit:.1e} is the most."
    except torch.OutOfMemoryError:  # it says nothing about the kernels
        raise
    except BROKEN as error:
        return f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
    return ""


def _runs(case: Case, dtype: torch.dtype, configs: Sequence[int]) -> Iterator[tuple[str, Callable[[], float]]]:
    """What is checked: its name, and a call that returns the scaled error."""
    deep, weighted = is_deep(case.weight.device), case.gradients * case.weight.double()

    def gram(config: int) -> float:
        got = gram_entries(*case.factors, case.spans, config=gram_configs(dtype)[config], poison=True)
        return _entries_error(got, case.gradients)

    def outer(config: int) -> float:
        size = outer_configs(dtype, store=False, deep=deep)[config]
        roots = ((None, case.gradients), (case.weight, weighted))
        return max(
            _entries_error(outer_entries(*case.factors, case.spans, root, config=size, poison=True), gradients)
            for root, gradients in roots
        )

    def stored(config: int) -> float:
        size = outer_configs(dtype, store=True, deep=deep)[config]
        got, gradient = outer_with_gradient(
            *case.factors, case.spans, case.coefficients, case.weight, config=size, poison=True
        )
        want = torch.einsum("ks,skoi->oi", case.coefficients.double(), case.gradients)
        return max(_entries_error(got, weighted), _number((gradient.double() - want).norm() / want.norm()))

    def groups(config: int) -> float:
        pairs, tokens = len(case.spans), len(case.factors[0]) // len(case.spans)
        lengths = [*case.spans.chosen_length, *case.spans.rejected_length]
        u, v = torch.cat(case.factors[::2]), torch.cat(case.factors[1::2])
        worst = 0.0
        for size in (2 * pairs, pairs):  # blocks of 8 rows, and of 4
            members = [range(first, first + size) for first in range(0, 2 * pairs, size)]
            rows = Groups.padded(tokens, lengths, members)
            by_gram = gram_products(u, v, rows, config=gram_configs(dtype)[config], poison=True)
            plan = plan_groups(dtype, u.shape[1], v.shape[1], rows, budget=2**24, config=group_configs(dtype)[config])
            by_outer = outer_products(u, v, rows, case.weight, plan=plan, poison=True)
            worst = max(
                worst,
                _products_error(by_gram, case.gradients.flatten(0, 1), members),
                _products_error(by_outer, weighted.flatten(0, 1), members),
            )
        return worst

    for config in configs:
        yield "gram_entries", partial(gram, config)
        yield "outer_entries", partial(outer, config)
        yield "outer_with_gradient", partial(stored, config)
        yield "products in groups", partial(groups, config)


def _case(device: torch.device, u: torch.dtype, v: torch.dtype, shape: Shape) -> Case:
    # Every device and dtype is named: a default that the user has set is not the kernels' fault.
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu").to(device)

    length, pairs = shape.longest, len(shape.chosen)
    factors, gradients = [], []
    for lengths in (shape.chosen, shape.rejected):
        left, right = draw(pairs, length, shape.rows).to(u), draw(pairs, length, shape.cols).to(v)
        for x, y, tokens in zip(left, right, lengths, strict=True):
            gradients.append(x[:tokens].double().T @ y[:tokens].double())
            x[tokens:] = float("nan")
            y[tokens:] = float("nan")
        factors += [left.flatten(0, 1), right.flatten(0, 1)]
    return Case(
        factors=(factors[0], factors[1], factors[2], factors[3]),
        spans=Spans.padded(pairs, length, shape.chosen + shape.rejected),
        weight=draw(shape.rows, shape.cols).abs(),
        coefficients=draw(pairs, 2),
        gradients=torch.stack(gradients).view(2, pairs, shape.rows, shape.cols),
    )


def _entries_error(got: Tensor, gradients: Tensor) -> float:
    """Scaled error of entries `[k, 3]`, against gradients `[2, k, O, I]`."""
    chosen, rejected = gradients
    want = torch.stack(
        [(x * y).sum((1, 2)) for x, y in ((chosen, chosen), (rejected, rejected), (chosen, rejected))], 1
    )
    return _scaled(got, want, torch.stack([want[:, 0], want[:, 1], want[:, :2].prod(1).sqrt()], 1))


def _products_error(got: Tensor, gradients: Tensor, members: Sequence[Sequence[int]]) -> float:
    """Scaled error of the products in groups, against gradients `[N, O, I]`."""
    matrix = torch.einsum("moi,noi->mn", gradients, gradients)
    pairs = [pair for group in members for pair in couples(group)]
    left, right = (torch.tensor(side, device=got.device) for side in zip(*pairs, strict=True))
    norms = matrix.diagonal().sqrt()
    return _scaled(got, matrix[left, right], norms[left] * norms[right])


def _scaled(got: Tensor, want: Tensor, scale: Tensor) -> float:
    return _number(torch.where(got == want, 0.0, (got - want).abs() / scale).max())


def _number(error: Tensor) -> float:
    """inf for what is no number: nan compares as small to some."""
    return float(error.nan_to_num(nan=float("inf")))
