"""Scaling a gradient that is held as factors: exact, in a dtype that a tensor core takes where there is one."""

from __future__ import annotations

import pytest
import torch

from gradent.hooks.uses.formats import Factored, Materialized, SparseRows, scaled, scaled_rows, split_factor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
POWERS = [1.0, 2.0**-20, 2.0**13, 2.0**90, 2.0**-91]


@pytest.mark.parametrize("factor", [1e-30, -7e28, 2.0**17, -(2.0**-17)])
def test_a_factor_is_a_power_of_two_and_a_rest(factor: float) -> None:
    power, rest = split_factor(factor)
    assert power * rest == factor
    assert 0.5 <= abs(rest) < 1.0
    assert torch.tensor(power, dtype=torch.bfloat16).double() == power
    assert split_factor(0.0) == (0.0, 0.0)


@pytest.mark.parametrize("factor", [1.0, -3.7, 0.5, 2.0**16, -(2.0**-16)])
def test_a_factor_near_one_can_wait(factor: float) -> None:
    assert split_factor(factor) == (1.0, factor)
    form = Factored(torch.randn(5, 3), torch.randn(5, 7))
    assert scaled(form, 1.0) is form
    u, v = scaled_rows(form.u[None], form.v[None], [1.0])
    assert u.data_ptr() == form.u.data_ptr() and v.data_ptr() == form.v.data_ptr()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_factors_lose_nothing(dtype: torch.dtype, power: float) -> None:
    torch.manual_seed(0)
    small = power**-1.0  # the cotangent of a row whose coefficient is 1 / power
    u, v = torch.randn(5, 3).to(torch.float64), torch.randn(5, 7).to(dtype)
    u = (u * small).to(dtype if dtype != torch.float16 else torch.float32)
    want = (u.double().T @ v.double()) * power
    got = scaled(Factored(u, v), power)
    assert isinstance(got, Factored)
    assert torch.equal(got.u.double().T @ got.v.double(), want)
    rows = scaled_rows(u[None], v[None], [power])
    assert torch.equal(rows[0][0].double().T @ rows[1][0].double(), want)
    if dtype == torch.bfloat16:
        assert got.u.dtype == got.v.dtype == rows[0].dtype == rows[1].dtype == torch.bfloat16


def test_other_forms() -> None:
    values = torch.randn(4, 3)
    rows, explicit = scaled(SparseRows(torch.arange(4), values), 2.0**10), scaled(Materialized(values), 2.0**10)
    assert isinstance(rows, SparseRows) and torch.equal(rows.values, values * 1024)
    assert isinstance(explicit, Materialized) and torch.equal(explicit.grad, values * 1024)
    zero = scaled_rows(torch.ones(2, 4, 3), torch.ones(2, 4, 5), [0.0, 2.0])
    assert not zero[0][0].any() and bool((zero[0][1] == 2.0).all())
