"""Whether the kernels are right on this device, with this driver and this Triton: asked once before they are used.

Kernels have been seen to return zeros on some versions, and a wrong entry looks like any other. So each kernel runs on
small operands of odd sizes, at its smallest and its largest tile, against float64 in plain torch; and in 16 bits, as a
model's layers are, on larger ones whose sizes are multiples of 8: several tiles, loads that run ahead of the products.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from gradent.kernels.common.triton_operands import Spans
from gradent.kernels.common.triton_tiles import gram_configs, is_deep, outer_configs
from gradent.kernels.gram.triton import gram_entries
from gradent.kernels.outer.triton import outer_entries, outer_with_gradient

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
    """Operands and what must come out.

    Attributes:
        factors: `(u_w, v_w, u_l, v_l)`, nan between the spans.
        spans: three ragged pairs, one without chosen tokens.
        weight: `[O, I]` float32.
        coefficients: `[k, 2]` float32.
        entries: `[k, 3]` float64.
        weighted: `[k, 3]` float64, with the weight.
        gradient: `[O, I]` float64.
    """

    factors: tuple[Tensor, Tensor, Tensor, Tensor]
    spans: Spans
    weight: Tensor
    coefficients: Tensor
    entries: Tensor
    weighted: Tensor
    gradient: Tensor


def self_check(device: torch.device | str) -> str:
    """Run every kernel on small operands and compare with float64.

    Three ragged pairs a launch, one of them without chosen tokens; nan in the padding, in what the kernels are to
    write, and in no result. An error is scaled by `‖G_i‖‖G_j‖` (of the stored gradient by its own norm) and may be
    `TOLERANCE · √T` with T the longest row; a zero gradient must give exactly 0.

    Args:
        device: a CUDA device, or the CPU under Triton's interpreter.

    Returns:
        "" where all is right; else a sentence that says what is wrong. That Triton cannot compile or launch (one of
        `BROKEN`) is such a sentence too; any other exception is passed on.

    Raises:
        OutOfMemoryError: torch's own; it says nothing about the kernels.
    """
    try:
        for u, v in DTYPES:
            for shape in (ODD, EVEN) if u.itemsize == v.itemsize == 2 else (ODD,):
                case, limit = _case(torch.device(device), u, v, shape), TOLERANCE * shape.longest**0.5
                for name, run in _runs(case, u if u == v else torch.float32, shape.configs):
                    error = run()
                    if not error <= limit:
                        return f"{name} is off by {error:.1e} on {u} and {v}, where {limit:.1e} is the most."
    except torch.OutOfMemoryError:
        raise
    except BROKEN as error:
        return f"{type(error).__name__}: {str(error).strip() or 'without a message'}"
    return ""


def _runs(case: Case, dtype: torch.dtype, configs: Sequence[int]) -> Iterator[tuple[str, Callable[[], float]]]:
    """What is checked: its name, and a call that returns the scaled error."""
    deep = is_deep(case.weight.device)

    def gram(config: int) -> float:
        got = gram_entries(*case.factors, case.spans, config=gram_configs(dtype)[config], poison=True)
        return _entries_error(got, case.entries)

    def outer(config: int) -> float:
        size = outer_configs(dtype, store=False, deep=deep)[config]
        got, weighted = (
            outer_entries(*case.factors, case.spans, weight, config=size, poison=True) for weight in (None, case.weight)
        )
        return max(_entries_error(got, case.entries), _entries_error(weighted, case.weighted))

    def stored(config: int) -> float:
        size = outer_configs(dtype, store=True, deep=deep)[config]
        got, gradient = outer_with_gradient(
            *case.factors, case.spans, case.coefficients, case.weight, config=size, poison=True
        )
        difference = (gradient.double() - case.gradient).norm() / case.gradient.norm()
        return max(_entries_error(got, case.weighted), _number(difference))

    for config in configs:
        yield "gram_entries", partial(gram, config)
        yield "outer_entries", partial(outer, config)
        yield "outer_with_gradient", partial(stored, config)


def _case(device: torch.device, u: torch.dtype, v: torch.dtype, shape: Shape) -> Case:
    # Every device and dtype is named: a default that the user has set is not the kernels' fault.
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu").to(device)

    length, pairs = shape.longest, len(shape.chosen)
    spans = Spans.padded(pairs, length, shape.chosen + shape.rejected)
    factors, sides = [], []
    for lengths in (shape.chosen, shape.rejected):
        left, right = draw(pairs, length, shape.rows).to(u), draw(pairs, length, shape.cols).to(v)
        for row, tokens in enumerate(lengths):
            left[row, tokens:] = float("nan")
            right[row, tokens:] = float("nan")
        sides.append(
            [x[:tokens].double().T @ y[:tokens].double() for x, y, tokens in zip(left, right, lengths, strict=True)]
        )
        factors += [left.flatten(0, 1), right.flatten(0, 1)]
    weight, coefficients = draw(shape.rows, shape.cols).abs(), draw(pairs, 2)
    gradient = sum(
        c[0] * chosen + c[1] * rejected for c, chosen, rejected in zip(coefficients.double(), *sides, strict=True)
    )
    assert isinstance(gradient, Tensor)
    return Case(
        factors=(factors[0], factors[1], factors[2], factors[3]),
        spans=spans,
        weight=weight,
        coefficients=coefficients,
        entries=_twin(sides, torch.ones_like(gradient)),
        weighted=_twin(sides, weight.double()),
        gradient=gradient,
    )


def _twin(sides: list[list[Tensor]], weight: Tensor) -> Tensor:
    """Gram entries, float64 `[k, 3]`, of gradients that are held whole."""
    rows = [
        torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum()])
        for x, y in ((chosen * weight, rejected * weight) for chosen, rejected in zip(*sides, strict=True))
    ]
    return torch.stack(rows)


def _entries_error(got: Tensor, want: Tensor) -> float:
    norms = want[:, :2].sqrt()
    scale = torch.stack((want[:, 0], want[:, 1], norms[:, 0] * norms[:, 1]), 1)
    return _number(torch.where(got == want, 0.0, (got - want).abs() / scale).max())


def _number(error: Tensor) -> float:
    """inf for what is no number: nan compares as small to some."""
    return float(error.nan_to_num(nan=float("inf")))
