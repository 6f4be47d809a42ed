"""`measure` on the two models that everything else varies: exactness, padding, batching, budgets, precision, errors."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from gradent import PairBatch, measure
from gradent.errors import GradentWarning, MemoryBudgetError, NonFiniteError, UncoveredParameterError
from gradent.hooks.capture.capture import Capture
from gradent.measurement import sequence_logps
from tests.batches import left_padded, ragged
from tests.live import LiveBytes
from tests.truth import TOLERANCE, assert_exact, scaled_error, truth

ENGINES = ["hooks", "func"]


@pytest.fixture(autouse=True)
def unexpected_warnings() -> Iterator[None]:
    """Neither model here may need a fallback."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradentWarning)
        yield


def many(pairs: int, longest: int = 20) -> PairBatch:
    draw = random.Random(0)

    def tokens() -> list[int]:
        return [draw.randrange(3, 250) for _ in range(draw.randint(1, longest))]

    return PairBatch.from_tokens([(tokens(), tokens(), [*tokens(), 251]) for _ in range(pairs)])


@pytest.mark.parametrize("engine", ENGINES)
def test_gpt2_in_float64(tiny_gpt2: GPT2LMHeadModel, engine: str) -> None:
    true = truth(tiny_gpt2, ragged())
    assert true.arithmetic == "float64"
    assert_exact(measure(tiny_gpt2, ragged(), engine=engine, by_module=True), true, ragged())


@pytest.mark.parametrize("engine", ENGINES)
def test_llama_in_float32_against_float64(tiny_llama: LlamaForCausalLM, engine: str) -> None:
    true = truth(tiny_llama, ragged(), dtype=torch.float64)
    assert_exact(measure(tiny_llama, ragged(), engine=engine), true, ragged(), TOLERANCE["float32"])


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_side_makes_no_difference(tiny_gpt2: GPT2LMHeadModel, engine: str) -> None:
    right, left = (measure(tiny_gpt2, batch, engine=engine) for batch in (ragged(), left_padded(ragged())))
    torch.testing.assert_close(left.inner, right.inner, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pairs", [1, 2, 64])
def test_number_of_pairs(tiny_gpt2: GPT2LMHeadModel, pairs: int) -> None:
    batch = many(pairs)
    assert_exact(measure(tiny_gpt2, batch, by_module=True), truth(tiny_gpt2, batch), batch)


def test_pairs_do_not_depend_on_their_company(tiny_gpt2: GPT2LMHeadModel) -> None:
    together = measure(tiny_gpt2, many(16))
    for pair in (0, 7, 15):
        alone = measure(tiny_gpt2, many(16).select([pair]))
        torch.testing.assert_close(alone.inner[0], together.inner[pair], rtol=1e-10, atol=0)


def test_modules_sum_to_the_totals(tiny_gpt2: GPT2LMHeadModel) -> None:
    gram = measure(tiny_gpt2, ragged(), by_module=True)
    assert gram.modules is not None
    for index, total in enumerate((gram.chosen_sq, gram.rejected_sq, gram.inner)):
        torch.testing.assert_close(sum(entry[index] for entry in gram.modules.values()), total, rtol=1e-13, atol=0)
    assert set(gram.modules) == {name.rpartition(".")[0] for name, _ in tiny_gpt2.named_parameters()}


def test_the_result_is_float64_on_the_cpu(tiny_llama: LlamaForCausalLM) -> None:
    gram = measure(tiny_llama, ragged())
    for tensor in (gram.chosen_sq, gram.rejected_sq, gram.inner, gram.cosine, gram.chosen_logp, gram.rejected_logp):
        assert tensor.dtype == torch.float64 and tensor.shape == (3,) and tensor.device.type == "cpu"
    torch.testing.assert_close(gram.cosine, gram.inner / (gram.chosen_sq * gram.rejected_sq).sqrt())


def test_log_probs_of_a_reference(tiny_gpt2: GPT2LMHeadModel) -> None:
    gram, (chosen, rejected) = measure(tiny_gpt2, many(9)), sequence_logps(tiny_gpt2, many(9))
    torch.testing.assert_close(chosen, gram.chosen_logp, rtol=1e-12, atol=0)
    torch.testing.assert_close(rejected, gram.rejected_logp, rtol=1e-12, atol=0)


@pytest.mark.parametrize("what", ["head only", "norms only", "one layer", "embeddings frozen"])
@pytest.mark.parametrize("engine", ENGINES)
def test_partly_frozen(tiny_gpt2: GPT2LMHeadModel, what: str, engine: str) -> None:
    keep = {
        "head only": lambda name: name.startswith("transformer.wte"),
        "norms only": lambda name: "ln_" in name,
        "one layer": lambda name: ".h.1.mlp" in name,
        "embeddings frozen": lambda name: "wte" not in name and "wpe" not in name,
    }[what]
    for name, parameter in tiny_gpt2.named_parameters():
        parameter.requires_grad_(keep(name))
    gram = measure(tiny_gpt2, ragged(), engine=engine, by_module=True)
    assert_exact(gram, truth(tiny_gpt2, ragged()), ragged())


@pytest.mark.parametrize("budget", ["8KiB", "64KiB", "1MiB", None])
def test_any_budget_gives_the_same_result(tiny_gpt2: GPT2LMHeadModel, budget: str | None) -> None:
    gram = measure(tiny_gpt2, many(6), memory_budget=budget, by_module=True)
    assert_exact(gram, truth(tiny_gpt2, many(6)), many(6))


def test_a_budget_too_small_for_anything(tiny_gpt2: GPT2LMHeadModel) -> None:
    with pytest.raises(MemoryBudgetError, match="needs 16 bytes"):
        measure(tiny_gpt2, ragged(), memory_budget=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(tiny_llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    tiny_llama.to(dtype)
    # The same rounded weights in float64: what remains is the rounding of activations and cotangents.
    true = truth(tiny_llama, ragged(), dtype=torch.float64)
    gram = measure(tiny_llama, ragged())
    assert scaled_error(gram, true) <= TOLERANCE["bfloat16"]
    assert gram.inner.dtype == torch.float64


def test_products_are_accumulated_wide(tiny_llama: LlamaForCausalLM) -> None:
    """Entries of a bfloat16 model agree with its own bfloat16 gradients far better than bfloat16 sums could."""
    tiny_llama.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradentWarning)
        gram, own = measure(tiny_llama, ragged()), truth(tiny_llama, ragged())
    assert scaled_error(gram, own) <= 5e-3


def test_autocast(tiny_llama: LlamaForCausalLM) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gram = measure(tiny_llama, ragged())
    true = truth(tiny_llama, ragged(), dtype=torch.float64)
    assert scaled_error(gram, true) <= TOLERANCE["bfloat16"]
    assert scaled_error(gram, truth(tiny_llama, ragged())) > TOLERANCE["float32"], "autocast was not in force"


class Odd(nn.Module):
    """A language model with a use that no rule covers: rows of a table, scaled by an exponential."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(97, 8)
        self.scale = nn.Parameter(torch.randn(200, 8))
        self.head = nn.Linear(8, 97)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids).cumsum(1)
        return self.head(torch.tanh(hidden * self.scale.exp().mean(0)))


def test_explicit_gradients_within_the_budget() -> None:
    with pytest.warns(GradentWarning, match="scale"):
        gram = measure(Odd(), ragged(), by_module=True, memory_budget="1MiB")
    assert_exact(gram, truth(Odd(), ragged()), ragged())


def test_what_does_not_fit_the_budget_is_named_or_reported() -> None:
    message = r"scale: no rule.* 51200 bytes.*memory_budget=20000"
    with pytest.warns(GradentWarning), pytest.raises(UncoveredParameterError, match=message) as caught:
        measure(Odd(), ragged(), memory_budget=20000)
    assert "allow_uncovered=True" in str(caught.value)
    with pytest.warns(GradentWarning):
        gram = measure(Odd(), ragged(), memory_budget=20000, allow_uncovered=True)
    rest = 97 * 8 + 97 * 8 + 97
    assert gram.coverage == pytest.approx(rest / (rest + 1600))
    assert list(gram.uncovered) == ["scale"]
    frozen = Odd()
    frozen.scale.requires_grad_(False)
    torch.testing.assert_close(gram.inner, measure(frozen, ragged()).inner, rtol=1e-12, atol=0)


class TwoLoose(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(150, 8, dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids).cumsum(1) + self.shift.sin().mean(0)
        return self.head(torch.tanh(hidden * self.scale.exp().mean(0)))


def test_explicit_gradients_in_several_passes() -> None:
    calls = []
    model = TwoLoose()
    model.head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(GradentWarning):
        gram = measure(model, ragged(1), memory_budget=60000, by_module=True)
    assert_exact(gram, truth(TwoLoose(), ragged(1)), ragged(1))
    assert len(calls) == 2 + 2 + 1 + 2, "causality, two rows, the batched trial, two rows again for the second pass"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("engine", ENGINES)
def test_non_finite_logits(tiny_gpt2: GPT2LMHeadModel, value: float, engine: str) -> None:
    with torch.no_grad():
        tiny_gpt2.transformer.wte.weight[96] = value  # a token of pair 1 alone
    with pytest.raises(NonFiniteError, match="non-finite logits"):
        measure(tiny_gpt2, ragged(), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_non_finite_gradient_is_traced_to_its_layer(tiny_gpt2: GPT2LMHeadModel, engine: str) -> None:
    class Poison(torch.autograd.Function):
        """Passes values on, but a gradient of nan."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None: ...

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * float("nan")

    handle = tiny_gpt2.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, a, out: Poison.apply(out))
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.0\.mlp\.c_fc" if engine == "hooks" else "transformer"):
        measure(tiny_gpt2, ragged(), engine=engine)  # type: ignore[arg-type]
    handle.remove()


def test_a_compiled_model_is_measured_through_its_wrapper(tiny_gpt2: GPT2LMHeadModel) -> None:
    compiled = torch.compile(tiny_gpt2, backend="eager")
    torch.testing.assert_close(measure(compiled, ragged()).inner, measure(tiny_gpt2, ragged()).inner)


def test_no_second_copy_of_the_logits() -> None:
    """Largest tensor made while measuring: the logits themselves, no float copy and no gradient of their size."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5000, 4), nn.Linear(4, 5000, bias=False)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embedding(input_ids))

    torch.manual_seed(0)
    model = Wide()
    batch = PairBatch.from_tokens([(list(range(100)), list(range(100, 130)), list(range(200, 230)))])
    measure(model, batch)
    logits = 2 * 130 * 5000 * 4
    with LiveBytes() as live:
        measure(model, batch, memory_budget="256KiB")
    assert sorted(live.made)[-1] == logits
    assert sum(size >= logits for size in live.made) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_pass_stays_in_memory(tiny_gpt2: GPT2LMHeadModel, fails: bool) -> None:
    """Graphs go when they are done with, without the help of the garbage collector, also after an exception."""

    def counted() -> tuple[int, int]:
        kinds = [type(thing) for thing in gc.get_objects()]
        return sum(issubclass(kind, Tensor) for kind in kinds), sum(kind is Capture for kind in kinds)

    def fail(*args: object) -> None:
        raise RuntimeError("out of order")

    batch = ragged()
    measure(tiny_gpt2, batch)
    handle = tiny_gpt2.transformer.ln_f.register_forward_hook(fail) if fails else None
    gc.collect()
    gc.disable()
    try:
        before = counted()
        for _ in range(3):
            if fails:
                with pytest.raises(RuntimeError, match="out of order"):
                    measure(tiny_gpt2, batch)
            else:
                measure(tiny_gpt2, batch)
        if fails:
            gc.collect()  # the tracebacks themselves are rings of frames
        after = counted()
    finally:
        gc.enable()
        if handle is not None:
            handle.remove()
    assert after == before
