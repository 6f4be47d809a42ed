"""Operands of ragged pairs as the kernels take them, and their gradients in float64: shared by the kernels' tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from gradent.kernels.common.triton_operands import Groups, Spans

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]


@dataclass(frozen=True)
class Operands:
    """Factors of k pairs, nan where no token is.

    Attributes:
        factors: `(u_w, v_w, u_l, v_l)`.
        spans: where the tokens lie.
        chosen: float64 `[k, O, I]`.
        rejected: float64 `[k, O, I]`.
    """

    factors: tuple[Tensor, Tensor, Tensor, Tensor]
    spans: Spans
    chosen: Tensor
    rejected: Tensor

    def entries(self, weight: Tensor | None = None) -> Tensor:
        """`[k, 3]` float64."""
        x, y = self.chosen, self.rejected
        if weight is not None:
            x, y = x * weight.double(), y * weight.double()
        return torch.stack([(x * x).sum((1, 2)), (y * y).sum((1, 2)), (x * y).sum((1, 2))], 1)

    def gradient(self, coefficients: Tensor) -> Tensor:
        """`Σ_k c_w G_w + c_l G_l`, `[O, I]` float64."""
        wide = coefficients.double()
        return torch.einsum("k,koi->oi", wide[:, 0], self.chosen) + torch.einsum("k,koi->oi", wide[:, 1], self.rejected)

    def limit(self) -> float:
        """Largest scaled error that float32 accumulation may leave: 5e-7 √T."""
        return 5e-7 * max(1, self.spans.longest) ** 0.5


def draw(
    chosen: Sequence[int],
    rejected: Sequence[int],
    rows: int,
    cols: int,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    device: str = "cpu",
    shift: float = 0.0,
) -> Operands:
    """Operands with the given lengths, in rows padded to one more than the longest.

    Args:
        chosen: tokens of each chosen row.
        rejected: tokens of each rejected row.
        rows: O.
        cols: I.
        dtypes: of u and v; the float64 twin is that of the rounded values.
        device: where to.
        shift: added to every value: sums of one sign drift furthest.

    Returns:
        The operands.
    """
    generator = torch.Generator().manual_seed(sum(chosen) * 7 + sum(rejected) * 3 + rows)
    length = max(*chosen, *rejected) + 1
    factors, gradients = [], []
    for lengths in (chosen, rejected):
        made = [
            (torch.randn(len(lengths), length, width, generator=generator) + shift).to(device, dtype)
            for width, dtype in zip((rows, cols), dtypes, strict=True)
        ]
        sides = [[row[:tokens].double() for row, tokens in zip(side, lengths, strict=True)] for side in made]
        gradients.append(torch.stack([u.T @ v for u, v in zip(*sides, strict=True)]))
        for side in made:
            for row, tokens in zip(side, lengths, strict=True):
                row[tokens:] = float("nan")
            factors.append(side.flatten(0, 1))
    spans = Spans.padded(len(chosen), length, torch.tensor([*chosen, *rejected]))
    return Operands((factors[0], factors[1], factors[2], factors[3]), spans, gradients[0], gradients[1])


def scaled(got: Tensor, want: Tensor) -> float:
    """Largest difference of `[k, 3]` entries over `‖G_i‖‖G_j‖`; inf for nan, or anything but 0 for a zero gradient."""
    norms = want[:, :2].sqrt()
    scale = torch.stack([want[:, 0], want[:, 1], norms[:, 0] * norms[:, 1]], 1)
    error = torch.where(got == want, 0.0, (got - want).abs() / scale)
    return float(error.nan_to_num(nan=float("inf")).max())


def strided(factor: Tensor) -> Tensor:
    """The same values in memory that is neither row- nor column-major."""
    wide = torch.full((factor.shape[1] * 2, factor.shape[0] * 3), float("nan"), dtype=factor.dtype)
    view = wide[::2, ::3].T
    view.copy_(factor)
    assert not view.is_contiguous() and view.stride(1) != 1
    return view


def products_error(got: Tensor, gradients: Tensor, groups: Groups, weight: Tensor | None = None) -> float:
    """Largest difference over `‖G_i‖‖G_j‖`; inf for nan, or anything but 0 for a zero gradient."""
    if weight is not None:
        gradients = gradients * weight.double()
    pairs = [pair for group in groups.members for pair in [*zip(group, group, strict=True), *combinations(group, 2)]]
    want = torch.stack([(gradients[i] * gradients[j]).sum() for i, j in pairs])
    scale = torch.stack([gradients[i].norm() * gradients[j].norm() for i, j in pairs])
    assert got.shape == want.shape == (groups.count,) and got.dtype == torch.float64
    return float(torch.where(got == want, 0.0, (got - want).abs() / scale).nan_to_num(nan=float("inf")).max())
