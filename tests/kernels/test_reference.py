"""The plain reductions against einsum in float64: both forms, every dtype, ragged and empty rows, any tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradent.kernels.common.cost import choose
from gradent.kernels.common.numerics import in_memory_order, reduce_batch, reduce_dense, reduce_flat, row_products

SHAPES = [(1, 1, 1, 1), (3, 17, 63, 129), (40, 2, 5, 7), (2, 3, 200, 300), (129, 63, 17, 3), (5, 0, 9, 4), (0, 5, 9, 4)]
# The operands are given, so only the accumulation rounds: float32 products whatever the inputs' dtype.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-7, torch.float16: 5e-7}


def operands(t_w: int, t_l: int, rows: int, cols: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t_w * 1000 + t_l + rows)
    shapes = [(t_w, rows), (t_w, cols), (t_l, rows), (t_l, cols)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def truth(u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, weight: Tensor | None = None) -> Tensor:
    chosen, rejected = u_w.double().T @ v_w.double(), u_l.double().T @ v_l.double()
    if weight is not None:
        chosen, rejected = chosen * weight.double(), rejected * weight.double()
    return torch.stack([(chosen * chosen).sum(), (rejected * rejected).sum(), (chosen * rejected).sum()])


def scaled(got: Tensor, want: Tensor) -> float:
    norms = want[:2].sqrt()
    scale = torch.stack([norms[0] ** 2, norms[1] ** 2, norms[0] * norms[1]])
    # A side without tokens has a zero gradient, and must come out as exactly that.
    return float(torch.where(scale > 0, (got - want).abs() / scale, got.abs() * float("inf")).nan_to_num(0.0).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [2**9, 2**13, 2**28])
def test_dense_equals_einsum(dtype: torch.dtype, shape: tuple[int, int, int, int], budget: int) -> None:
    given = operands(*shape, dtype)
    got = reduce_dense(*given, budget=budget)
    assert got.dtype == torch.float64
    assert scaled(got, truth(*given)) <= TOLERANCE[dtype]


def test_the_shapes_above_cover_both_forms() -> None:
    assert {choose(*shape, itemsize=4, budget=2**28).form for shape in SHAPES} == {"gram", "outer"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [2**10, 2**28])
def test_a_metric_weights_every_entry(shape: tuple[int, int, int, int], budget: int) -> None:
    given = operands(*shape, torch.float64)
    weight = torch.rand(shape[2], shape[3], dtype=torch.float64)
    assert scaled(reduce_dense(*given, budget=budget, weight=weight), truth(*given, weight)) <= 1e-14


def test_operands_need_not_be_contiguous() -> None:
    u_w, v_w, u_l, v_l = operands(3, 17, 63, 129, torch.float32)
    strided = [tensor.T.contiguous().T for tensor in (u_w, v_w, u_l, v_l)]
    assert not strided[0].is_contiguous()
    assert scaled(reduce_dense(*strided, budget=2**28), truth(u_w, v_w, u_l, v_l)) <= 5e-7


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "cols"), [(129, 3), (3, 129), (17, 17), (2, 1), (1, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_equals_einsum_whichever_side_is_narrow(
    dtype: torch.dtype, rows: int, cols: int, weighted: bool
) -> None:
    pairs = [operands(19, 19, rows, cols, dtype), operands(19, 19, rows, cols, dtype)]
    weight = torch.rand(rows, cols, generator=torch.Generator().manual_seed(5)) if weighted else None
    u, v = (
        torch.stack([pairs[0][side], pairs[1][side] * 2, pairs[0][side + 2], pairs[1][side + 2]]) for side in (0, 1)
    )
    entries = reduce_batch(
        u, v, weight=None if weight is None else weight.to(torch.promote_types(dtype, torch.float32))
    )
    for pair, got in enumerate(entries):
        assert scaled(got, truth(u[pair], v[pair], u[pair + 2], v[pair + 2], weight)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("rows", "cols"), [(129, 3), (3, 129)])
def test_rows_products_are_read_as_they_lie(rows: int, cols: int) -> None:
    u, v = torch.randn(2, 19, rows), torch.randn(2, 19, cols)
    grads = row_products(u, v)
    torch.testing.assert_close(grads, torch.einsum("rto,rti->roi", u, v))
    flat = in_memory_order(grads)
    assert flat.data_ptr() == grads.data_ptr()  # no copy
    assert torch.equal(flat.sort(1).values, grads.reshape(2, -1).sort(1).values)


def test_the_test_can_fail() -> None:
    u_w, v_w, u_l, v_l = operands(3, 17, 63, 129, torch.float64)
    right = truth(u_w, v_w, u_l, v_l)
    assert scaled(torch.zeros(3, dtype=torch.float64), right) > 0.1
    assert scaled(reduce_dense(u_l, v_l, u_w, v_w, budget=2**28), right) > 0.1
    assert scaled(reduce_dense(u_w[1:], v_w[1:], u_l, v_l, budget=2**28), right) > 1e-3


@pytest.mark.parametrize("size", [1, 16383, 16384, 16385, 3_000_001])
def test_long_float32_dots_lose_nothing_that_matters(size: int) -> None:
    # All positive: the case in which one long float32 sum drifts furthest.
    tile = torch.rand(2, size, generator=torch.Generator().manual_seed(size))
    wide = tile.double()
    want = torch.stack([wide[0] @ wide[0], wide[1] @ wide[1], wide[0] @ wide[1]])
    assert scaled(reduce_flat(tile), want) <= 5e-7
