"""The products of a weight gradient, formed row by row: each pair's entries and the sum, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradent.kernels.with_weight_grad import reduce_shared

SHAPES = [(1, 1, 1, 1), (2, 17, 63, 129), (3, 5, 300, 7), (1, 129, 3, 17), (4, 33, 65, 64)]


def draw(pairs: int, tokens: int, rows: int, cols: int, dtype: torch.dtype, extra: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(pairs * 1000 + tokens)
    shape = (2 * pairs + extra, tokens)
    parts = [torch.randn(*shape, size, generator=source, dtype=torch.float64).to(dtype) for size in (rows, cols)]
    return parts[0], parts[1]


def truth(
    u: Tensor, v: Tensor, places: list[int], factors: list[float], weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    products = u.double().mT @ v.double()
    pairs = sum(place >= 0 for place in places) // 2
    entries = torch.zeros(pairs, 3, dtype=torch.float64)
    for pair in range(pairs):
        sides = [factors[row] * products[row] for row in (places.index(pair), places.index(pair + pairs))]
        chosen, rejected = sides if weight is None else [side * weight.double() for side in sides]
        entries[pair] = torch.stack([(chosen**2).sum(), (rejected**2).sum(), (chosen * rejected).sum()])
    return entries, products.sum(0)


def apart(got: Tensor, want: Tensor) -> float:
    """The largest error of an entry, scaled by the norms."""
    norms = want[:, :2].sqrt()
    scale = torch.cat([norms**2, norms.prod(1, keepdim=True)], 1)
    return float(((got - want).abs() / scale.clamp_min(1e-300)).max())


@pytest.mark.parametrize("budget", [64, 2**12, 2**28])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(shape: tuple[int, int, int, int], dtype: torch.dtype, budget: int) -> None:
    u, v = draw(*shape, dtype)
    places = list(range(2 * shape[0]))[::-1]
    factors = [(-1.0) ** row * 2.0 ** (row - 1) * 1.1 for row in places]
    entries, total = reduce_shared(u, v, places, factors, pairs=shape[0], budget=budget)
    want, summed = truth(u, v, places, factors)
    limit = 1e-14 if dtype == torch.float64 else 5e-7
    assert apart(entries, want) <= limit
    assert float((total - summed).norm() / summed.norm()) <= limit
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_kernel_equals_float64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("GRADENT_KERNELS", "triton")
    u, v = draw(*shape, dtype, extra=1)
    places = [*range(2 * shape[0]), -1][::-1]
    factors = [(-1.0) ** row * 2.0 ** (row - 1) * 1.1 for row in range(len(places))]
    factors[-1] = 0.0
    entries, total = reduce_shared(u, v, places, factors, pairs=shape[0], budget=2**28)
    want, summed = truth(u, v, places, factors)
    assert apart(entries, want) <= 5e-7 * 12
    assert float((total - summed).norm() / summed.norm()) <= 5e-7 * 12


def test_rows_without_partner_or_factor_count_in_the_sum_alone() -> None:
    u, v = draw(2, 9, 20, 30, torch.float32, extra=1)
    places, factors = [0, 2, -1, 1, 3], [2.0, 0.0, 5.0, -3.0, 0.5]
    entries, total = reduce_shared(u, v, places, factors, pairs=2, budget=2**20)
    want, summed = truth(u, v, places, factors)
    torch.testing.assert_close(total.double(), summed, rtol=1e-5, atol=1e-5)
    assert apart(entries[1:], want[1:]) <= 5e-7
    assert apart(entries[:1, :1].expand(1, 3), want[:1, :1].expand(1, 3)) <= 5e-7
    assert entries[0].tolist()[1:] == [0.0, 0.0]


@pytest.mark.parametrize("budget", [2**11, 2**28])
@pytest.mark.parametrize("places", [[0, 1, 2], [2, 0, 3, -1], [0, -1], [-1, -1]])
def test_a_row_without_its_partner_meets_zero(places: list[int], budget: int) -> None:
    u, v = (part[: len(places)] for part in draw(2, 9, 20, 30, torch.float32, extra=1))
    entries, total = reduce_shared(u, v, places, [1.0] * len(places), pairs=2, budget=budget)
    products = torch.einsum("rto,rti->roi", u.double(), v.double())
    grads = torch.zeros(4, 20, 30, dtype=torch.float64)
    for row, place in enumerate(places):
        if place >= 0:
            grads[place] = products[row]
    chosen, rejected = grads[:2].flatten(1), grads[2:].flatten(1)
    want = torch.stack([(chosen**2).sum(1), (rejected**2).sum(1), (chosen * rejected).sum(1)], 1)
    torch.testing.assert_close(entries, want, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(total.double(), products.sum(0), rtol=1e-5, atol=1e-4)


def test_a_weight_is_of_the_entries_alone() -> None:
    u, v = draw(2, 9, 20, 30, torch.float64)
    weight = torch.rand(20, 30, dtype=torch.float64)
    entries, total = reduce_shared(u, v, [0, 1, 2, 3], [1.0] * 4, pairs=2, budget=2**11, weight=weight)
    want, summed = truth(u, v, [0, 1, 2, 3], [1.0] * 4, weight)
    assert apart(entries, want) <= 1e-14
    torch.testing.assert_close(total, summed)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e15])
def test_a_row_of_any_size_is_measured_as_its_factor_makes_it(size: float) -> None:
    u, v = draw(1, 9, 20, 30, torch.float32)
    entries, total = reduce_shared(u * size, v, [0, 1], [1 / size, 1 / size], pairs=1, budget=2**20)
    assert apart(entries, truth(u, v, [0, 1], [1.0, 1.0])[0]) <= 1e-6
    want = truth(u, v, [0, 1], [1.0, 1.0])[1] * size
    torch.testing.assert_close(total.double(), want, rtol=1e-4, atol=1e-5 * size)
