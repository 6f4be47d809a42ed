"""The outer kernel in Triton's interpreter, with and without the stored gradient, against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from gradent.errors import InputError
from gradent.kernels.common import triton_tiles
from gradent.kernels.common.tiles import is_deep, outer_configs, pick_outer
from gradent.kernels.common.triton_operands import Spans, blank, on_device
from gradent.kernels.outer import triton as outer
from gradent.kernels.outer.triton import outer_entries, outer_scratch, outer_with_gradient
from gradent.kernels.self_check import TOLERANCE
from tests.kernels.operands import DTYPES, Operands, draw, scaled, strided

SHAPES = [
    ([1], [1], 1, 1),
    ([3], [17], 63, 129),
    ([129], [63], 17, 3),
    ([17, 0, 63, 0, 1], [3, 17, 0, 0, 40], 17, 63),
]
PAIRS = ([17, 0, 5], [3, 40, 1])


def root(given: Operands, dtype: torch.dtype = torch.float32) -> Tensor:
    size = (given.factors[0].shape[1], given.factors[1].shape[1])
    return (torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.1).to(dtype)


def weights(pairs: int) -> Tensor:
    return torch.randn(pairs, 2, generator=torch.Generator().manual_seed(2))


def gradient_error(got: Tensor, given: Operands, coefficients: Tensor) -> float:
    want = given.gradient(coefficients)
    error = (got.double() - want).norm() / want.norm()
    return float(error.nan_to_num(nan=float("inf")))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[list[int], list[int], int, int], weighted: bool) -> None:
    given = draw(*shape)
    weight = root(given) if weighted else None
    got = outer_entries(*given.factors, given.spans, weight, poison=True)
    assert got.dtype == torch.float64 and got.shape == (len(given.spans), 3)
    assert scaled(got, given.entries(weight)) <= given.limit()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    given = draw(*PAIRS, 63, 33, dtypes)
    got = outer_entries(*given.factors, given.spans, root(given), poison=True)
    assert scaled(got, given.entries(root(given))) <= given.limit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", [False, True])
def test_configurations(dtype: torch.dtype, store: bool) -> None:
    given, coefficients = draw([17, 3], [33, 0], 19, 45, (dtype, dtype)), weights(2)
    configs = outer_configs(dtype, store=store)
    for config in [*configs[::4], configs[-1]]:
        if store:
            got, gradient = outer_with_gradient(*given.factors, given.spans, coefficients, config=config, poison=True)
            assert gradient_error(gradient, given, coefficients) <= given.limit(), config
        else:
            got = outer_entries(*given.factors, given.spans, config=config, poison=True)
        assert scaled(got, given.entries()) <= given.limit(), config


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_stored_gradient(dtypes: tuple[torch.dtype, torch.dtype], weighted: bool) -> None:
    """Over all pairs, with their coefficients, and never weighted by the metric."""
    given, coefficients = draw(*PAIRS, 35, 33, dtypes), weights(3)
    weight = root(given) if weighted else None
    got, gradient = outer_with_gradient(*given.factors, given.spans, coefficients, weight, poison=True)
    assert scaled(got, given.entries(weight)) <= given.limit()
    assert gradient.dtype == torch.float32
    assert gradient_error(gradient, given, coefficients) <= given.limit()


# The interpreter cuts bfloat16 off where a device rounds: a whole unit in the last place.
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-11)])
def test_the_gradient_is_rounded_once(dtype: torch.dtype, unit: float) -> None:
    given, coefficients = draw(*PAIRS, 35, 33), weights(3)
    _, gradient = outer_with_gradient(*given.factors, given.spans, coefficients, out_dtype=dtype, poison=True)
    want = given.gradient(coefficients)
    assert gradient.dtype == dtype
    assert ((gradient.double() - want).abs() <= unit * want.abs() + 1e-4 * unit * want.abs().max()).all()


def test_no_pairs_give_a_zero_gradient() -> None:
    empty = [torch.zeros(0, width) for width in (5, 7, 5, 7)]
    entries, gradient = outer_with_gradient(*empty, Spans.packed([], []), torch.zeros(0, 2), poison=True)
    assert entries.shape == (0, 3) and torch.equal(gradient, torch.zeros(5, 7))
    entries, gradient = outer_with_gradient(*empty, Spans.packed([0], [0]), torch.ones(1, 2), poison=True)
    assert torch.equal(entries, torch.zeros(1, 3).double()) and torch.equal(gradient, torch.zeros(5, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_and_stride(dtype: torch.dtype) -> None:
    given = draw(*PAIRS, 35, 33)
    weight = root(given, dtype)
    got = outer_entries(*given.factors, given.spans, strided(weight))
    assert scaled(got, given.entries(weight)) <= given.limit()
    row = weight[:1].expand(35, 33)
    assert scaled(outer_entries(*given.factors, given.spans, row), given.entries(row)) <= given.limit()


def test_any_strides() -> None:
    given, coefficients = draw([17, 5], [3, 20], 35, 33), weights(2)
    views = [strided(factor) for factor in given.factors]
    assert torch.equal(outer_entries(*views, given.spans), outer_entries(*given.factors, given.spans))
    got, want = (outer_with_gradient(*some, given.spans, coefficients) for some in (views, given.factors))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_strides_that_no_tile_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 64 bits within a tile give what those of 32 do."""
    given = draw([17, 5], [3, 20], 35, 33)
    near = outer_entries(*given.factors, given.spans, root(given))
    monkeypatch.setattr(triton_tiles, "REACH", 1)
    assert torch.equal(outer_entries(*given.factors, given.spans, root(given)), near)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(8, 24), (8, 7), (5, 16), (1, 8)])
def test_sizes_told_in_eights(rows: int, cols: int, store: bool) -> None:
    """The same bits where rows are multiples of 8 apart, and where they are not."""
    given, coefficients = draw(*PAIRS, rows, cols), weights(3)
    tensors = [*given.factors, root(given)]
    apart = [torch.full((len(factor), factor.shape[1] + 3), float("nan")) for factor in tensors]
    views = [wide[:, :-3].copy_(factor) for wide, factor in zip(apart, tensors, strict=True)]
    found = []
    for *factors, weight in (tensors, views):
        if store:
            got, gradient = outer_with_gradient(*factors, given.spans, coefficients, weight, poison=True)
            assert gradient_error(gradient, given, coefficients) <= given.limit()
        else:
            got = outer_entries(*factors, given.spans, weight, poison=True)
        assert scaled(got, given.entries(root(given))) <= given.limit()
        found.append(got)
    assert torch.equal(*found)


def test_packed_rows() -> None:
    given = draw(*PAIRS, 19, 33)
    packed = [factor[~factor[:, 0].isnan()] for factor in given.factors]
    got = outer_entries(*packed, Spans.packed(*PAIRS))
    assert torch.equal(got, outer_entries(*given.factors, given.spans))


def test_sums_of_one_sign() -> None:
    given = draw([1000], [65], 17, 33, shift=3.0)
    assert scaled(outer_entries(*given.factors, given.spans), given.entries()) <= given.limit()


def test_the_same_bits_every_time() -> None:
    given, coefficients = draw(*PAIRS, 35, 33), weights(3)
    first = outer_with_gradient(*given.factors, given.spans, coefficients)
    second = outer_with_gradient(*given.factors, given.spans, coefficients, poison=True)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_scratch_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given, made = draw(*PAIRS, 63, 33), []
    monkeypatch.setattr(outer, "blank", lambda *shape, **how: made.append(blank(*shape, **how)) or made[-1])
    outer_entries(*given.factors, given.spans)
    said = outer_scratch(*given.factors, given.spans)
    assert said == made[0].nbytes + on_device(given.spans, "lines", torch.device("cpu")).nbytes


def test_the_test_can_fail() -> None:
    given, coefficients = draw([17, 5], [3, 20], 63, 33), weights(2)
    right, (u_w, v_w, u_l, v_l) = given.entries(), given.factors
    assert scaled(outer_entries(*given.factors, given.spans, root(given)), right) > 0.1
    assert scaled(outer_entries(u_w, v_w, u_l, v_l, Spans.padded(2, 21, torch.tensor([16, 5, 3, 20]))), right) > 1e-3
    longer = Spans.padded(2, 21, torch.tensor([18, 5, 3, 20]))
    assert scaled(outer_entries(u_w, v_w, u_l, v_l, longer), right) == float("inf"), "the padding is poisoned"
    _, gradient = outer_with_gradient(*given.factors, given.spans, coefficients.flip(1))
    assert gradient_error(gradient, given, coefficients) > 0.1


def test_what_is_refused() -> None:
    given = draw([3], [5], 7, 9)
    with pytest.raises(InputError, match=r"take float32.*float64"):
        outer_entries(*(factor.double() for factor in given.factors), given.spans)
    with pytest.raises(InputError, match=r"weight is \[7, 9\]"):
        outer_entries(*given.factors, given.spans, torch.ones(9, 7))
    with pytest.raises(InputError, match=r"coefficients are .*\[1, 2\]"):
        outer_with_gradient(*given.factors, given.spans, torch.ones(2))
    with pytest.raises(InputError, match="out_dtype"):
        outer_with_gradient(*given.factors, given.spans, torch.ones(1, 2), out_dtype=torch.float64)


def test_tiles_shrink_where_a_device_would_idle() -> None:
    def size(rows: int, cols: int, pairs: int = 1, store: bool = False) -> tuple[int, int]:
        config = pick_outer(torch.bfloat16, rows, cols, pairs, store=store)
        return config.rows, config.cols

    assert size(4096, 4096) == (128, 128)
    assert size(4096, 4096, store=True) == (128, 64)
    assert size(16, 4096) == (16, 32)
    assert size(16, 4096, pairs=8) == (16, 128)
    assert size(1, 1) == (16, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_deepest_pipelines_are_for_devices_that_can_hold_them(dtype: torch.dtype) -> None:
    for store, stages in ((False, 3), (True, 2)):
        deep, flat = (pick_outer(dtype, 4096, 4096, 1, store=store, deep=deep) for deep in (True, False))
        assert (deep.rows, deep.cols) == (flat.rows, flat.cols)
        assert deep.depth == 128 and deep.stages == stages
        for config in outer_configs(dtype, store=store, deep=False):
            assert 2 * config.stages * config.depth * (config.rows + config.cols) <= 99 * 1024
    for store in (False, True):
        single = [outer_configs(torch.float32, store=store, deep=deep) for deep in (True, False)]
        assert single[0] == single[1]


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("tokens", [64, 2048])
def test_what_a_tensor_core_adds_up_by_itself(tokens: int, shift: float) -> None:
    """A model: 16 products at a time are added and cut off after 24 bits, `depth` of them before a sum is rounded."""

    def error(depth: int) -> float:
        generator = torch.Generator().manual_seed(tokens)
        u, v = ((torch.randn(tokens, 64, generator=generator) + shift).bfloat16().double() for _ in range(2))
        total = torch.zeros(64, 64)
        for start in range(0, tokens, depth):
            chain = torch.zeros(64, 64, dtype=torch.float64)
            for step in range(start, min(tokens, start + depth), 16):
                mantissa, exponent = torch.frexp(chain + u[step : step + 16].T @ v[step : step + 16])
                chain = torch.ldexp((mantissa * 2**24).trunc() / 2**24, exponent)
            total += chain.float()
        exact = (u.T @ v).square().sum()
        return float((total.double().square().sum() - exact).abs() / exact)

    deepest = max(config.depth for config in outer_configs(torch.bfloat16, store=False))
    assert error(deepest) <= 0.06 * TOLERANCE * tokens**0.5
    assert error(16 * deepest) > 2 * error(deepest) or tokens < 16 * deepest, "longer chains drift further"


@pytest.mark.parametrize(("shared", "deep"), [(232448, True), (166912, False), (101376, False), (None, False)])
def test_a_device_is_asked_for_its_shared_memory(
    shared: int | None, deep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = SimpleNamespace() if shared is None else SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    assert is_deep.__wrapped__(torch.device("cuda", 0)) is deep
    assert is_deep(torch.device("cpu"))
