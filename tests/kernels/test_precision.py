"""Products are formed in their own dtype, whatever a training run allows itself; and it gets its allowance back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gradent import measure
from gradent.kernels.common.numerics import products, reduce_dense, reduce_flat, reduce_tiles
from gradent.kernels.common.precision import exact_products, is_exact
from tests.batches import ragged
from tests.zoo import build

CPU = torch.device("cpu")


@pytest.fixture(params=["medium", "autocast"])
def loose(request: pytest.FixtureRequest) -> Iterator[str]:
    """float32 products on this CPU lose three digits."""
    if request.param == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield request.param
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield request.param
    torch.set_float32_matmul_precision(before)


def product() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    left, right = torch.randn(64, 512), torch.randn(512, 64)
    return left @ right, left.double() @ right.double()


def lost(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


def test_what_a_run_allows_is_given_back(loose: str) -> None:
    if lost(*product()) < 1e-4:
        pytest.skip("this CPU computes float32 products in float32 all the same")
    with exact_products(CPU):
        assert lost(*product()) < 1e-6
    with pytest.raises(ZeroDivisionError), exact_products(CPU):
        raise ZeroDivisionError
    assert lost(*product()) > 1e-4
    assert torch.get_float32_matmul_precision() == ("highest" if loose == "autocast" else "medium")
    assert torch.is_autocast_enabled("cpu") == (loose == "autocast")


def test_the_last_thread_inside_gives_the_allowance_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with exact_products(CPU):
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert first_in.wait(10)
        with exact_products(CPU):
            second_in.set()
            assert first_out.wait(10)
            assert is_exact(CPU), "the other thread has gone, this one has not"
        assert not is_exact(CPU)
    finally:
        thread.join()
        torch.set_float32_matmul_precision(before)


def test_reductions(loose: str) -> None:
    torch.manual_seed(0)
    tile = torch.randn(2, 40_000)
    want = torch.stack([(x.double() * y.double()).sum() for x, y in zip(tile[[0, 1, 0]], tile[[0, 1, 1]], strict=True)])
    assert lost(reduce_flat(tile), want) < 1e-6
    assert lost(reduce_tiles(tile)[0], want) < 1e-6
    u, v = torch.randn(2, 40, 96), torch.randn(2, 40, 80)
    wide = u.double().mT @ v.double()
    assert lost(products(u, v), wide) < 1e-6
    sums = torch.stack([(wide[0] ** 2).sum(), (wide[1] ** 2).sum(), (wide[0] * wide[1]).sum()])
    for budget in (2**12, 2**26):
        assert lost(reduce_dense(u[0], v[0], u[1], v[1], budget=budget), sums) < 1e-6


def test_a_measurement_where_products_may_be_short() -> None:
    """The model's own products are as the run has them; those of gradent are not shorter."""
    model, batch = build("llama", dtype=torch.float32), ragged()
    want = measure(model, batch)
    torch.set_float32_matmul_precision("medium")
    try:
        got = measure(model, batch)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert lost(got.inner, want.inner) < 0.1
