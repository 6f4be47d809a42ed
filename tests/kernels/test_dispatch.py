"""Who reduces: plain torch on a CPU, the kernels where they are asked for, and a fallback that is announced once."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from benchmarks.reduced import reduce_rows
from gradent import measure
from gradent.errors import GradentWarning, InputError
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import Factored
from gradent.kernels import availability, dispatch
from gradent.kernels.common.wanted import Wanted
from gradent.kernels.gram.reference import reduce_gram
from gradent.kernels.outer.reference import reduce_all_rows
from gradent.kernels.strategy import Product, decide
from gradent.notices import Notices, warn
from tests.batches import ragged
from tests.truth import TOLERANCE, assert_exact, truth

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from triton.runtime.errors import OutOfResources

    from gradent.kernels import self_check as check
    from gradent.kernels.gram import triton as gram
    from gradent.kernels.outer import triton as outer

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable, and no verdict from before."""
    monkeypatch.delenv(availability.VARIABLE, raising=False)
    monkeypatch.setattr(availability, "_verdicts", {})
    monkeypatch.setattr(availability, "_notices", Notices(warn))
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradentWarning)
        yield


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(availability.VARIABLE, "triton")


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(4, 9, 7, generator=generator).to(dtype)
    return u, torch.randn(4, 9, 5, generator=generator).to(dtype)


PAIRS = Wanted.pairs(2)


def product(u: Tensor, v: Tensor, **fields: Any) -> Product:
    sizes = {"rows": len(u), "lengths": (u.shape[1],) * 2, "out": u.shape[2], "inp": v.shape[2]}
    return Product(**{**sizes, "dtypes": (u.dtype, v.dtype), "has_kernels": True, "is_complete": True, **fields})


def whole(u: Tensor, v: Tensor) -> Tensor:
    grads = u.double().mT @ v.double()
    products = torch.einsum("aoi,boi->ab", grads, grads)
    half = len(u) // 2
    return torch.cat(
        [torch.stack([products[k, k], products[k + half, k + half], products[k, k + half]]) for k in range(half)]
    )


def test_the_path_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert availability.path("cpu", torch.float32) == "torch (operands on the cpu)"
    assert availability.path(CUDA, torch.float64) == "torch (float64 operands)"
    monkeypatch.setenv(availability.VARIABLE, "torch")
    assert availability.path(CUDA, torch.float32) == "torch (GRADENT_KERNELS=torch)"
    monkeypatch.setenv(availability.VARIABLE, "fast")
    with pytest.raises(InputError, match="accepted are 'torch' and 'triton'"):
        availability.path(CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cpu_has_the_reference_bit_by_bit(dtype: torch.dtype) -> None:
    u, v = rows(dtype)
    assert torch.equal(reduce_rows(u, v, PAIRS, budget=2**20), reduce_all_rows(u, v, PAIRS))
    pair = [(u[0, :2], v[0, :2]), (u[2, :2], v[2, :2])]
    strategy = decide(product(u, v, lengths=(2, 2), rows=2, has_factors=True, has_kernels=False), 300)
    assert strategy.form == "gram"
    assert torch.equal(dispatch.reduce_group(pair, budget=300), reduce_gram(pair, strategy.tiling, budget=300))


@needs_triton
def test_a_self_check_that_succeeds_is_silent_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(check, "self_check", lambda device: asked.append(device) or "")
    assert [availability.path(CUDA, dtype) for dtype in (torch.float32, torch.bfloat16)] == ["triton", "triton"]
    assert asked == [CUDA]


@needs_triton
def test_a_self_check_that_fails_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "self_check", lambda device: "gram_entries is off by 1.0e+00.")
    with pytest.warns(
        GradentWarning, match=r"cuda:0 .*off by 1\.0e\+00.*pip install --upgrade 'gradent\[cuda\]'"
    ) as seen:
        assert "self-check failed" in availability.path(CUDA, torch.float32)
    assert len(seen) == 1
    assert availability.path(CUDA, torch.bfloat16).startswith("torch (the kernels' self-check failed")


def test_missing_triton_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(GradentWarning, match=r"Triton is not installed.*pip install 'gradent\[cuda\]'") as seen:
        assert availability.path(CUDA, torch.float32) == "torch (Triton is not installed)"
    assert len(seen) == 1
    assert availability.path(CUDA, torch.float32) == "torch (Triton is not installed)"
    monkeypatch.setenv(availability.VARIABLE, "triton")
    with pytest.raises(InputError, match="Triton is not installed"):
        availability.path(CUDA, torch.float32)


@needs_triton
def test_the_self_check_sees_a_metric_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that weighs entries is compiled by itself: a right one without a metric vouches for nothing."""
    entries = check.outer_entries
    monkeypatch.setattr(check, "outer_entries", lambda *given, **more: entries(*given[:5], **more))
    assert check.self_check("cpu").startswith("outer_entries is off by")


@needs_triton
def test_the_self_check_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "DTYPES", check.DTYPES[3:])
    assert check.self_check("cpu") == ""
    right = check.outer_entries
    monkeypatch.setattr(check, "outer_entries", lambda *given, **how: torch.zeros_like(right(*given, **how)))
    assert check.self_check("cpu").startswith("outer_entries is off by 1.0e+00 on torch.float32 and torch.bfloat16")
    monkeypatch.setattr(check, "outer_entries", lambda *given, **how: right(*given, **how) * float("nan"))
    assert check.self_check("cpu").startswith("outer_entries is off by inf")


@needs_triton
def test_what_the_user_set_is_not_the_kernels_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default device, or dtype, of the process."""
    monkeypatch.setattr(check, "DTYPES", check.DTYPES[:1])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert check.self_check("cpu") == ""
    finally:
        torch.set_default_dtype(torch.float32)


@needs_triton
@pytest.mark.parametrize("kind", [RuntimeError, OSError, torch.OutOfMemoryError, KeyError])
def test_what_the_self_check_catches(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def fail(*given: object, **how: object) -> Tensor:
        raise kind("no compiler")

    monkeypatch.setattr(check, "gram_entries", fail)
    if kind in (RuntimeError, OSError):
        assert check.self_check("cpu") == f"{kind.__name__}: no compiler"
    else:
        with pytest.raises(kind):
            check.self_check("cpu")


@needs_triton
@pytest.mark.parametrize("lengths", [None, [9, 4, 1, 9]])
@pytest.mark.parametrize("budget", [16, 64, 2**20])
def test_pairs_by_kernels_and_what_they_leave(kernels: None, budget: int, lengths: list[int] | None) -> None:
    u, v = rows()
    ends = [9] * 4 if lengths is None else lengths
    for row, end in enumerate(ends):
        u[row, end:] = 0
    given = None if lengths is None else torch.tensor(lengths)
    assert availability.path(CPU, torch.float32) == "triton"
    assert (decide(product(u, v), budget).reducer == "outer") == (budget > 64)
    assert (decide(product(u[:2], v[:2], rows=2), budget).backend == "triton") == (budget >= 64)
    for x, y in ((u, v), (u[:, :, :6], v), (u[:, :7], v[:, :7])):  # the last is no view of [2k T, ...]
        kept = None if given is None else given.clamp(max=x.shape[1])
        said = budget == 16 and x is u  # once
        with pytest.warns(GradentWarning, match=r"hold \d+ bytes .* memory_budget is 16") if said else nullcontext():
            got = reduce_rows(x, y, PAIRS, budget=budget, lengths=None if kept is None else kept.tolist())
        torch.testing.assert_close(got, whole(x, y), rtol=2e-6, atol=1e-6)


@needs_triton
def test_a_capture_before_the_check_is_announced_once_and_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "is_capturing", lambda device: True)
    with pytest.warns(GradentWarning, match="CUDA graph is captured.*measure once before the capture") as seen:
        assert availability.path(CUDA, torch.float32).startswith("torch (a CUDA graph")
    assert len(seen) == 1
    assert availability.path(CUDA, torch.float32).startswith("torch (a CUDA graph")
    monkeypatch.setattr(availability, "is_capturing", lambda device: False)
    monkeypatch.setattr(check, "self_check", lambda device: "")
    assert availability.path(CUDA, torch.float32) == "triton"


@needs_triton
@pytest.mark.parametrize("weighted", [False, True])
def test_what_was_decided_is_what_is_launched(kernels: None, monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    u, v = rows()
    weight = torch.full((7, 5), 0.5) if weighted else None
    asked: list[int] = []
    right = outer.outer_entries
    monkeypatch.setattr(outer, "outer_entries", lambda *given: asked.append(1) or right(*given))
    strategy = decide(product(u, v, is_weighted=weighted), 2**20)
    assert (strategy.reducer, strategy.backend) == ("outer", "triton")
    got = dispatch.reduce_at_once(strategy, u, v, PAIRS, weight=weight)
    assert got is not None and asked == [1]
    torch.testing.assert_close(got, whole(u, v) * (0.25 if weighted else 1), rtol=2e-6, atol=1e-6)
    assert decide(product(u, v, is_weighted=weighted), 64).reducer != "outer"


@needs_triton
def test_what_kernels_cannot_do_is_said(kernels: None) -> None:
    u, v = rows()
    directed = decide(product(u, v, directions=2), 2**20)
    assert directed.backend == "torch" and "no products with directions" in directed.why


def failing(error: Exception) -> Callable[..., Tensor]:
    def fail(*given: object, **how: object) -> Tensor:
        raise error

    return fail


@needs_triton
def test_a_kernel_that_cannot_be_launched_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    u, v = rows()
    monkeypatch.setattr(dispatch, "on_kernels", lambda *operands: True)
    for error in (OutOfResources(98304, 65536, "shared memory"), RuntimeError("ptxas failed"), OSError("no compiler")):
        monkeypatch.setattr(availability, "_verdicts", {})
        monkeypatch.setattr(outer, "outer_entries", failing(error))
        with pytest.warns(GradentWarning, match=r"shared memory, Required: 98304|ptxas failed|no compiler") as seen:
            got = reduce_rows(u, v, PAIRS, budget=2**20)
        assert len(seen) == 1
        assert torch.equal(got, reduce_all_rows(u, v, PAIRS))
        assert type(error).__name__ in availability._verdicts[CPU]  # noqa: SLF001
    with pytest.warns(GradentWarning, match="no compiler"):
        got = dispatch.reduce_group([(u[0], v[0]), (u[2], v[2])], budget=2**20)
    torch.testing.assert_close(got, whole(u[[0, 2]], v[[0, 2]]), rtol=2e-6, atol=1e-6)


@needs_triton
def test_what_is_no_fault_of_a_kernel_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = "Triton Error [CUDA]: out of memory"
    for error, raised in (
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError),
        (RuntimeError(memory), torch.OutOfMemoryError),
        (KeyError("a mistake"), KeyError),
        (InputError("a wrong shape"), InputError),
    ):
        with pytest.raises(raised):
            availability.attempt(CPU, failing(error))
    assert availability._verdicts == {}  # noqa: SLF001
    monkeypatch.setenv(availability.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="ptxas"):
        availability.attempt(CPU, failing(RuntimeError("ptxas failed")))
    assert availability.attempt(CPU, lambda: 3) == 3


@needs_triton
def test_the_ledger_tries_again_where_memory_runs_out(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    u, v = rows()
    right, tries = outer.outer_entries, []

    def fail(*given: Tensor) -> Tensor:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("full")
        return right(*given)

    monkeypatch.setattr(outer, "outer_entries", fail)
    ledger = Ledger(Wanted.pairs(1), budget=2**20)
    ledger.add(0, 0, (), Factored(u[0], v[0]))
    ledger.add(0, 1, (), Factored(u[1], v[1]))
    ledger.finish(0)
    assert len(tries) == 2
    torch.testing.assert_close(ledger.entries[0], whole(u[:2], v[:2]), rtol=2e-6, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("budget", ["8KiB", None])
def test_a_whole_measurement_by_kernels(
    tiny_llama: LlamaForCausalLM, kernels: None, monkeypatch: pytest.MonkeyPatch, budget: str | None
) -> None:
    launched: list[str] = []
    for module, name in ((gram, "gram_entries"), (outer, "outer_entries")):
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *g, right=right, name=name: launched.append(name) or right(*g))
    batch = ragged()
    gram_entries = measure(tiny_llama, batch, by_module=True, memory_budget=budget)
    assert_exact(gram_entries, truth(tiny_llama, batch, dtype=torch.float64), batch, TOLERANCE["float32"])
    assert len(launched) >= 14, "every matrix of both layers"


@needs_triton
def test_float64_stays_with_the_reference(tiny_gpt2: GPT2LMHeadModel, kernels: None) -> None:
    assert_exact(measure(tiny_gpt2, ragged(), by_module=True), truth(tiny_gpt2, ragged()), ragged())
