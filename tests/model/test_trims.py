"""Logits of prompts are left out below the pair level too, where the model gives them so; and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from gradent.errors import GradentWarning
from gradent.measurement import sequence_logps
from gradent.model.calls import takes_keep
from gradent.model.facts import trims
from gradent.model.observed import observed
from gradent.pairs.batch import PairBatch
from gradent.tokens.effects import token_effects
from gradent.tokens.matrix import measure_tokens
from tests.adapters import build_adapted
from tests.batches import ragged
from tests.hooks.test_trim import Odd, _broken, _heedless, _shifted, _short, head_inputs, late_answers
from tests.odd_models import build_odd
from tests.truth import TOLERANCE, token_gradients, truth
from tests.zoo import build

PROMPT = list(range(30, 50))


def long_answers() -> PairBatch:
    """Prompts of 20 and 9 tokens; one response is long enough for a shorter row of its own, one has a single token."""
    return PairBatch.from_tokens(
        [(PROMPT, list(range(3, 43)), [17, 33, 70]), (PROMPT[:9], [12], [23, 42, 8, 61, 5])],
    )


def one_token_prompts() -> PairBatch:
    """A pair that has no prompt's logits to leave out, and after it one that has."""
    return PairBatch.from_tokens([([7], [5, 61, 9], [17, 33]), (PROMPT, [12, 88, 4], [23, 42])])


def logps_error(model: nn.Module, batch: PairBatch) -> float:
    true = truth(model, batch)
    want = torch.cat([true.chosen_logp, true.rejected_logp])
    return float(((torch.cat(sequence_logps(model, batch)) - want) / want).abs().max())


def tokens_error(model: nn.Module, batch: PairBatch) -> float:
    errors = []
    for pair, gram in enumerate(measure_tokens(model, batch, progress=False)):
        chosen, rejected = (token_gradients(model, *batch.row(row)) for row in (pair, len(batch) + pair))
        scale = chosen.norm(dim=1)[:, None] * rejected.norm(dim=1)[None]
        errors.append(((gram.inner - chosen @ rejected.T).abs() / scale).max())
    return float(torch.stack(errors).max())


def effects_error(model: nn.Module, batch: PairBatch) -> float:
    errors = []
    for pair, effects in enumerate(batch.split_tokens(token_effects(model, batch, "margin"))):
        rows = [token_gradients(model, *batch.row(row)) for row in (pair, len(batch) + pair)]
        v = rows[0].sum(0) - rows[1].sum(0)
        errors += [
            ((got - row @ v).abs() / (row.norm(dim=1) * v.norm())).max() for got, row in zip(effects, rows, strict=True)
        ]
    return float(torch.stack(errors).max())


WAYS: dict[str, Callable[[nn.Module, PairBatch], float]] = {
    "log-probs": logps_error,
    "token matrix": tokens_error,
    "effects": effects_error,
}
"""Each measurement's error against plain autograd."""

ways = pytest.mark.parametrize("way", WAYS)


@contextmanager
def told() -> Iterator[list[str]]:
    """What gradent says meanwhile."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradentWarning)
        yield said
    said += [str(each.message) for each in caught if issubclass(each.category, GradentWarning)]


def narrow_vocabulary() -> nn.Module:
    """Its logits are not wider than what they are made of: tokens have output gradients of their own from there on."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).double().eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tied head": (lambda: build("gpt2"), "float64"),
    "untied head": (lambda: build("llama"), "float32 islands"),
    "narrow vocabulary": (narrow_vocabulary, "float64"),
    "soft-capped logits": (lambda: build("gemma2"), "float32 islands"),
    "experts": (lambda: build("mixtral"), "float32 islands"),
    "recurrence": (lambda: build("mamba"), "float32 islands"),
    "virtual tokens": (lambda: build_adapted("prompt tuning, learned positions"), "float64"),
    "prefix": (lambda: build_adapted("prefix tuning"), "float32 islands"),
    "adapted head": (lambda: build_adapted("LoRA on embeddings and head"), "float32 islands"),
}


@ways
@pytest.mark.parametrize("name", MODELS)
def test_exact(name: str, way: str) -> None:
    make, arithmetic = MODELS[name]
    model, batch = make(), late_answers()
    with told() as said:
        for _ in range(2):  # with what is found out about the model, and with what is known of it
            assert WAYS[way](model, batch) <= TOLERANCE[arithmetic]
    assert said == []
    with observed(model):
        assert trims(model, batch.row(0)[0]), "or nothing has been left out here"


@ways
@pytest.mark.parametrize("make", [long_answers, one_token_prompts, ragged])
def test_rows_whose_prompts_differ(way: str, make: Callable[[], PairBatch]) -> None:
    model = build("gpt2")
    for _ in range(2):
        assert WAYS[way](model, make()) <= TOLERANCE["float64"]


@pytest.mark.parametrize(
    "call",
    [
        sequence_logps,
        measure_tokens,
        token_effects,
        lambda model, batch: token_effects(model, batch, {"transformer.ln_f.weight": torch.ones(16).double()}),
    ],
    ids=["log-probs", "token matrix", "effects", "effects of a vector"],
)
def test_the_head_sees_responses_alone(tiny_gpt2: GPT2LMHeadModel, call: Callable[..., object]) -> None:
    batch = late_answers()
    call(tiny_gpt2, batch)  # finds out how this model is to be measured
    with head_inputs(tiny_gpt2) as seen:
        call(tiny_gpt2, batch)
    assert set(seen) == {4}  # the prompt's last token, and the response


def test_a_shorter_row_leaves_its_prompt_out_too(tiny_gpt2: GPT2LMHeadModel) -> None:
    batch = long_answers().select([0])
    measure_tokens(tiny_gpt2, batch)
    with head_inputs(tiny_gpt2) as seen:
        measure_tokens(tiny_gpt2, batch)
    assert sorted(seen) == [4, 21, 41]


@ways
@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (_shifted, "it gives other logits"),
        (_short, "ModelError"),
        (_broken, "not for you"),
        (_heedless, "it gives those of 23 positions where 8 were asked for"),
    ],
)
def test_what_a_model_understands_otherwise_is_left_alone(
    tiny_gpt2: GPT2LMHeadModel, cut: Callable[[Tensor, int], Tensor], reason: str, way: str
) -> None:
    model = Odd(tiny_gpt2, cut).eval()
    with told() as said:
        for _ in range(2):
            assert WAYS[way](model, late_answers()) <= TOLERANCE["float64"]
    assert len(said) == 1  # once a model
    assert "Odd form the logits of prompts too" in said[0] and reason in said[0]


@ways
def test_what_a_first_row_does_not_show(tiny_gpt2: GPT2LMHeadModel, way: str) -> None:
    """From a prompt of one token on, all logits are wanted: shifting nothing is not heeding."""
    model = Odd(tiny_gpt2, _shifted).eval()
    with told() as said:
        assert WAYS[way](model, one_token_prompts()) <= TOLERANCE["float64"]
    assert len(said) == 1 and "other logits" in said[0]


def _doubled(out: Tensor, keep: int) -> Tensor:
    """The right logits, with a gradient that is not theirs."""
    return (2 * out - out.detach())[:, -keep:] if keep else out


@pytest.mark.parametrize(
    ("way", "says"), [("token matrix", "differs from the pair's inner product"), ("effects", None)]
)
def test_right_logits_with_wrong_gradients(tiny_gpt2: GPT2LMHeadModel, way: str, says: str | None) -> None:
    model = Odd(tiny_gpt2, _doubled).eval()
    with told() as said:
        for _ in range(2):
            assert WAYS[way](model, late_answers()) <= TOLERANCE["float64"]
    with observed(model):
        assert trims(model, late_answers().row(0)[0]), "it is not the logits that give it away"
    assert said == [] if says is None else says in said[0]


@ways
def test_a_model_without_it(way: str) -> None:
    model, batch = build_odd("a part without gradient"), late_answers()
    assert not takes_keep(model)
    with told() as said:
        for _ in range(2):
            assert WAYS[way](model, batch) <= TOLERANCE["float64"]
    assert said == []


def test_nan_is_no_verdict(tiny_gpt2: GPT2LMHeadModel) -> None:
    ids, weight = torch.tensor(PROMPT), tiny_gpt2.transformer.ln_f.weight
    kept = weight.detach().clone()
    with told() as said, observed(tiny_gpt2), torch.no_grad():
        weight.fill_(float("nan"))
        assert not trims(tiny_gpt2, ids)
        weight.copy_(kept)
        assert trims(tiny_gpt2, ids)
    assert said == []


class Masked(nn.Module):
    """Never predicts some tokens, as models do whose vocabulary was padded."""

    def __init__(self, inner: GPT2LMHeadModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0) -> Any:
        logits = self.inner(input_ids=input_ids, logits_to_keep=logits_to_keep).logits
        return torch.cat([logits[..., :97], torch.full_like(logits[..., 97:], float("-inf"))], -1)


def test_tokens_that_are_never_predicted(tiny_gpt2: GPT2LMHeadModel) -> None:
    with observed(tiny_gpt2):
        assert trims(Masked(tiny_gpt2), torch.tensor(PROMPT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [2, 3, 64])
def test_any_row_in_any_arithmetic(dtype: torch.dtype, length: int) -> None:
    ids = torch.arange(length) + 1  # up to the model's last position
    with told() as said:
        for name in ("gpt2", "llama"):
            assert trims(build(name, dtype=dtype), ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert trims(build("llama", dtype=torch.float32), ids)
    assert said == []
