"""The kernels on a device: real sizes, memory, addresses beyond 32 bits, whole measurements."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

pytest.importorskip("triton", reason="Triton is not installed")

from gradent import measure
from gradent.kernels import dispatch
from gradent.kernels.common.tiles import gram_configs, group_configs, is_deep, outer_configs, plan_groups
from gradent.kernels.common.triton_operands import Groups, Spans
from gradent.kernels.gram.triton import gram_entries, gram_products, gram_scratch
from gradent.kernels.outer.triton import outer_entries, outer_products, outer_scratch, outer_with_gradient
from gradent.kernels.self_check import self_check
from tests.batches import ragged
from tests.kernels.operands import DTYPES, draw, products_error, scaled
from tests.truth import TOLERANCE, scaled_error, truth

pytestmark = pytest.mark.cuda

LONG = [([8192], [5000]), ([2048, 0, 777], [1500, 2048, 1])]


def test_the_self_check_passes() -> None:
    assert self_check("cuda") == ""
    assert dispatch.path("cuda", torch.bfloat16) == "triton"


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_long_rows(lengths: tuple[list[int], list[int]], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    given = draw(*lengths, 1000, 520, dtypes, device="cuda")
    weight, coefficients = torch.rand(1000, 520, device="cuda"), torch.randn(len(given.spans), 2, device="cuda")
    assert scaled(gram_entries(*given.factors, given.spans, poison=True), given.entries()) <= given.limit()
    assert scaled(outer_entries(*given.factors, given.spans, poison=True), given.entries()) <= given.limit()
    got = outer_entries(*given.factors, given.spans, weight, poison=True)
    assert scaled(got, given.entries(weight)) <= given.limit()
    got, gradient = outer_with_gradient(*given.factors, given.spans, coefficients, weight, poison=True)
    assert scaled(got, given.entries(weight)) <= given.limit()
    want = given.gradient(coefficients)
    assert float((gradient - want).norm() / want.norm()) <= given.limit()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("members", [[range(6)], [[0, 3, 1, 4], [2, 5]]], ids=["one", "two"])
def test_groups_of_rows(members: list, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Every configuration, in one launch and the same bits twice, and with a budget that leaves a few programs."""
    given = draw(*LONG[1], 1000, 520, dtypes, device="cuda")
    u, v = (torch.cat(given.factors[side::2]) for side in (0, 1))
    lengths, weight = [*LONG[1][0], *LONG[1][1]], torch.rand(1000, 520, device="cuda")
    groups, gradients = Groups.padded(len(u) // 6, lengths, members), torch.cat([given.chosen, given.rejected])
    assert products_error(gram_products(u, v, groups, poison=True), gradients, groups) <= given.limit()
    wide = dtypes[0] if dtypes[0] == dtypes[1] else torch.float32
    for config, budget in [*((config, 2**30) for config in group_configs(wide)), (None, 2**18)]:
        plan = plan_groups(wide, 1000, 520, groups, budget=budget, config=config, deep=is_deep(u.device))
        first, second = (outer_products(u, v, groups, weight, plan=plan, poison=True) for _ in range(2))
        assert torch.equal(first, second), config
        assert products_error(first, gradients, groups, weight) <= given.limit(), config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_configuration(dtype: torch.dtype) -> None:
    given = draw([300, 17], [129, 0], 200, 330, (dtype, dtype), device="cuda")
    coefficients = torch.ones(2, 2, device="cuda")
    for config in gram_configs(dtype):
        got = gram_entries(*given.factors, given.spans, config=config, poison=True)
        assert scaled(got, given.entries()) <= given.limit(), config
    deep = is_deep(torch.device("cuda"))
    for config in outer_configs(dtype, store=False, deep=deep):
        got = outer_entries(*given.factors, given.spans, config=config, poison=True)
        assert scaled(got, given.entries()) <= given.limit(), config
    for config in outer_configs(dtype, store=True, deep=deep):
        got, _ = outer_with_gradient(*given.factors, given.spans, coefficients, config=config, poison=True)
        assert scaled(got, given.entries()) <= given.limit(), config


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_and_short(dtype: torch.dtype, shift: float) -> None:
    """Products over 14336 features and few tokens, of one sign too: where a tensor core's own sums would drift."""
    given = draw([64], [33], 2048, 14336, (dtype, dtype), device="cuda", shift=shift)
    assert scaled(gram_entries(*given.factors, given.spans), given.entries()) <= given.limit()


def test_the_same_bits_every_time() -> None:
    given, coefficients = draw(*LONG[1], 512, 768, DTYPES[1], device="cuda"), torch.randn(3, 2, device="cuda")
    for _ in range(3):
        first, second = (gram_entries(*given.factors, given.spans) for _ in range(2))
        assert torch.equal(first, second)
        one, other = (outer_with_gradient(*given.factors, given.spans, coefficients) for _ in range(2))
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("form", ["gram", "outer"])
def test_memory(form: str) -> None:
    """What a launch allocates: its scratch and its result, each in the allocator's blocks of 512 bytes."""
    run, scratch = {"gram": (gram_entries, gram_scratch), "outer": (outer_entries, outer_scratch)}[form]
    spans = Spans.packed([8192, 3000], [5000, 8192])
    factors = [torch.randn(rows, width, device="cuda").bfloat16() for rows in (11192, 13192) for width in (2048, 1024)]
    run(*factors, spans)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(*factors, spans)
    used = torch.cuda.max_memory_allocated() - before
    assert 0 < used <= scratch(*factors, spans) + 8 * 512
    assert used < 2**20, "two gradients in float32 are 16 MiB"


def test_dispatch_keeps_to_the_budget() -> None:
    u, v = torch.randn(4, 2048, 1024, device="cuda").bfloat16(), torch.randn(4, 2048, 4096, device="cuda").bfloat16()
    for budget in (2**14, 2**24):  # the smaller one leaves a third above the kernels' scratch
        dispatch.reduce_pairs(u, v, budget=budget)  # compiles, and opens cuBLAS's workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dispatch.reduce_pairs(u, v, budget=budget)
        assert torch.cuda.max_memory_allocated() - before <= budget + 64 * 1024


def test_addresses_beyond_32_bits() -> None:
    """More than 2³¹ elements before the rows that count; everything else is nan."""
    rows, width = 17000, 131072
    if torch.cuda.mem_get_info()[0] < 2 * rows * width * 2 + 2**32:
        pytest.skip("needs 13 GB of device memory")
    u = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").fill_(float("nan"))
    v = torch.full((rows, 64), float("nan"), dtype=torch.bfloat16, device="cuda")
    u[-60:].normal_()
    v[-60:].normal_()
    start, length = torch.tensor([rows - 60]), torch.tensor([40])
    spans = Spans(start, length, start + 40, length - 20)
    chosen, rejected = (u[cut].double().T @ v[cut].double() for cut in (slice(-60, -20), slice(-20, None)))
    want = torch.stack([(x * y).sum() for x, y in ((chosen, chosen), (rejected, rejected), (chosen, rejected))])[None]
    for run in (gram_entries, outer_entries):
        assert scaled(run(u, v, u, v, spans), want) <= 5e-7 * 40**0.5
        assert scaled(run(v, u, v, u, spans), want) <= 5e-7 * 40**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_measurement(tiny_llama: LlamaForCausalLM, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels and by torch on the same device, and against float64."""
    model, batch = tiny_llama.to("cuda", dtype), ragged()
    exact = truth(copy.deepcopy(model).to("cpu"), batch, dtype=torch.float64)
    limit = TOLERANCE[str(dtype).removeprefix("torch.")]
    for wanted in ("triton", "torch"):
        monkeypatch.setenv(dispatch.VARIABLE, wanted)
        assert scaled_error(measure(model, batch), exact) <= limit, wanted


def test_a_step_from_the_stored_gradient() -> None:
    """A linear layer's training step out of the kernel's gradient is that of float64 autograd."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 80, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = [torch.randn(tokens, 80, generator=generator, dtype=torch.float64) for tokens in (50, 31)]
    outputs = [(rows @ weight.T).tanh() for rows in inputs]
    cotangents = torch.autograd.grad(sum(output.sum() for output in outputs), outputs, retain_graph=True)
    given = [c * (1 - o.detach() ** 2) for c, o in zip(cotangents, outputs, strict=True)]
    loss = 0.3 * outputs[1].sum() - 0.7 * outputs[0].sum()
    want = torch.autograd.grad(loss, weight)[0]
    factors = [tensor.float().cuda() for tensor in (given[0], inputs[0], given[1], inputs[1])]
    coefficients = torch.tensor([[-0.7, 0.3]], device="cuda")
    _, gradient = outer_with_gradient(*factors, Spans.of_pair(50, 31), coefficients)
    assert float((gradient.double().cpu() - want).norm() / want.norm()) <= 1e-6
