"""Every token's effect is its own float64 backward's gradient along the direction, however it was computed."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradent.errors import (
    GradentWarning,
    InputError,
    ModelError,
    NonFiniteError,
    NotCausalError,
    NothingTrainableError,
)
from gradent.measurement import measure
from gradent.model.facts import facts
from gradent.pairs.batch import PairBatch
from gradent.tokens.effects import token_effects
from gradent.tokens.matrix import measure_tokens
from tests.adapters import build_adapted
from tests.batches import left_padded, ragged
from tests.odd_models import build_odd
from tests.odd_skeleton import WIDTH, Skeleton, normal
from tests.tokens.token_models import TOKEN_MODELS
from tests.truth import TOLERANCE, token_gradients, untouched
from tests.zoo import build
from tests.zoo_prints import zoo
from tests.zoo_tables import TWINS

FAILS = {
    "bloom": "its GELU is a custom autograd function without a jvp",
    "recurrent_gemma": "its square root is a custom autograd function without a jvp",
}
"""Families that torch cannot differentiate in forward mode: token by token, with a warning."""


def checkpointed(reentrant: bool) -> nn.Module:
    model = build("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()


MODELS = {
    **TOKEN_MODELS,
    "LoRA on fused experts": (lambda: build_adapted("LoRA on fused experts"), 1e-6),
    "checkpointed, training": (lambda: checkpointed(False), 1e-6),
    "checkpointed, reentrant, training": (lambda: checkpointed(True), 1e-6),
    "checkpointed block": (lambda: build_odd("checkpointed block"), 1e-9),
    "padding_idx in the text": (lambda: build_odd("padding_idx in the text"), 1e-9),
    "embedding scaled by frequency": (lambda: build_odd("embedding scaled by frequency"), 1e-9),
    "a part without gradient": (lambda: build_odd("a part without gradient"), 1e-9),
    "nn.MultiheadAttention": (lambda: build_odd("nn.MultiheadAttention"), 1e-9),
}


def by_backward(model: nn.Module, batch: PairBatch, toward: str | Tensor) -> tuple[Tensor, Tensor]:
    """Effects, and `‖g_a‖‖v‖` to scale their errors by, by one backward a token; `toward` a flat vector or a name."""
    modes = {module: module.training for module in model.modules()}
    gradients = [token_gradients(model.eval(), *batch.row(row)) for row in range(2 * len(batch))]
    for module, mode in modes.items():
        module.training = mode
    effects, scales = [], []
    for row, tokens in enumerate(gradients):
        pair = row % len(batch)
        chosen, rejected = gradients[pair].sum(0), gradients[len(batch) + pair].sum(0)
        named = {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}
        v = named[toward] if isinstance(toward, str) else toward
        effects.append(tokens @ v)
        scales.append(tokens.norm(dim=1) * v.norm())
    return torch.cat(effects), torch.cat(scales)


def scaled_error(got: Tensor, model: nn.Module, batch: PairBatch, toward: str | Tensor) -> float:
    """Largest error of an effect, scaled."""
    want, scale = by_backward(model, batch, toward)
    errors = (got - want).abs()
    return float(torch.where(errors == 0, 0.0, errors / scale).nan_to_num(nan=1.0).max())


def flat_vector(model: nn.Module, seed: int = 0) -> Tensor:
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quietly(*args, **kwargs) -> Tensor:
    """`token_effects`, in which a fallback is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradentWarning)
        return token_effects(*args, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_every_effect(name):
    make, limit = MODELS[name]
    batch, model = left_padded(ragged()), make()
    vector = flat_vector(model)
    for toward in ("rejected", "chosen", "margin", vector):
        with untouched(model):
            if name == "custom autograd function":
                with pytest.warns(GradentWarning, match=r"one backward pass a token.*NotImplementedError.*jvp"):
                    got = token_effects(model, batch, toward)
            else:
                got = quietly(model, batch, toward)
        assert got.dtype == torch.float64 and got.device.type == "cpu"
        assert got.shape == batch.input_ids[batch.completion_mask.bool()].shape
        assert scaled_error(got, model, batch, toward) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo())
def test_every_family(name):
    if name in TWINS:
        pytest.skip(f"the same model as {TWINS[name]}")
    model, draw = build(name), random.Random(name)
    batch = left_padded(ragged().select(draw.sample(range(2), k=1)))
    toward = draw.choice(["rejected", "chosen", "margin", flat_vector(model)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradentWarning)
        got = token_effects(model, batch, toward)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, GradentWarning)]
    assert bool(told) == (name in FAILS), told
    arithmetic = "float32" if next(model.parameters()).dtype == torch.float32 else "float32 islands"
    assert scaled_error(got, model, batch, toward) <= TOLERANCE[arithmetic]


@pytest.mark.parametrize("name", ["gpt2", "LoRA", "mixtral"])
def test_sums_are_those_of_measure_and_of_the_token_matrix(name):
    make, limit = MODELS[name]
    model, batch = make(), ragged()
    gram, matrices = measure(model, batch), measure_tokens(model, batch)
    effects = {toward: batch.split_tokens(quietly(model, batch, toward)) for toward in ("rejected", "chosen", "margin")}
    for pair, matrix in enumerate(matrices):
        scale = 10 * limit * float((gram.chosen_sq + gram.rejected_sq)[pair])
        toward_rejected, toward_chosen, margin = (effects[key][pair] for key in ("rejected", "chosen", "margin"))
        torch.testing.assert_close(toward_rejected[0], matrix.inner.sum(1), rtol=0, atol=scale)
        torch.testing.assert_close(toward_chosen[1], matrix.inner.sum(0), rtol=0, atol=scale)
        assert abs(float(toward_rejected[0].sum() - gram.inner[pair])) <= scale
        assert abs(float(toward_rejected[1].sum() - gram.rejected_sq[pair])) <= scale
        assert abs(float(toward_chosen[0].sum() - gram.chosen_sq[pair])) <= scale
        for side in (0, 1):
            torch.testing.assert_close(margin[side], toward_chosen[side] - toward_rejected[side], rtol=0, atol=scale)


def test_named_vectors():
    model, batch = build("gpt2"), ragged()
    flat = flat_vector(model)
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = torch.split(flat, [parameter.numel() for parameter in names.values()])
    named = {name: part.view(names[name].shape) for name, part in zip(names, parts, strict=True)}
    whole = quietly(model, batch, flat)
    assert torch.equal(quietly(model, batch, named), whole)
    halves = [dict(list(named.items())[part]) for part in (slice(0, None, 2), slice(1, None, 2))]
    torch.testing.assert_close(sum(quietly(model, batch, half) for half in halves), whole)
    assert torch.equal(quietly(model, batch, {}), torch.zeros_like(whole))
    assert torch.equal(quietly(model, batch, 0 * flat), torch.zeros_like(whole))
    for length in (1e-100, 1e30):
        torch.testing.assert_close(quietly(model, batch, length * flat) / length, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("toward", ["rejected", "margin", "vector"])
def test_narrow_models(dtype, toward):
    """As near to float64 as one backward a token in the same dtype."""
    model, batch = build("llama", dtype=dtype), ragged()
    true = copy.deepcopy(model).double()
    toward = flat_vector(model).to(dtype).double() if toward == "vector" else toward
    plain = scaled_error(by_backward(model, batch, toward)[0], true, batch, toward)
    assert 1e-9 < plain < {torch.float32: 5e-6, torch.bfloat16: 2e-2}[dtype]
    assert scaled_error(quietly(model, batch, toward), true, batch, toward) <= 2 * plain
    if isinstance(toward, Tensor):
        assert scaled_error(quietly(model, batch, 1e-20 * toward) * 1e20, true, batch, toward) <= 3 * plain


class _WrongJvp(torch.autograd.Function):
    factor = 1.5

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

    @staticmethod
    def jvp(ctx, tangent):
        return _WrongJvp.factor * tangent


class Tampered(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return _WrongJvp.apply(x @ self.weight)


@pytest.mark.parametrize("toward", ["rejected", "chosen", "margin", "vector"])
def test_a_wrong_derivative_is_caught(toward, monkeypatch):
    model, batch = Tampered().double(), ragged()
    toward = flat_vector(model) if toward == "vector" else toward
    with pytest.warns(GradentWarning, match=r"differs from a backward pass by [\d.]+e-\d+"):
        got = token_effects(model, batch, toward)
    assert scaled_error(got, model, batch, toward) <= 1e-9
    monkeypatch.setattr(_WrongJvp, "factor", 2.0)
    assert scaled_error(quietly(model, batch, toward), model, batch, toward) <= 1e-9


class Reentrant(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=True)


def test_models_that_cannot_be_measured():
    model, batch = build("gpt2"), ragged()
    with pytest.raises(ModelError, match="use_reentrant"):
        token_effects(Reentrant(), batch)
    with pytest.raises(NotCausalError):
        token_effects(Both(), batch)
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        token_effects(model, PairBatch.from_tokens([([1], [2], [10**6])]))
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(NonFiniteError, match="pair 0, rejected"):
        token_effects(model, batch)
    with pytest.raises(NothingTrainableError):
        token_effects(model.requires_grad_(False), batch)


class Both(Skeleton):
    def block(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class Mingling(Skeleton):
    """Rows of a batch see one another."""

    def block(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True).expand_as(x).tanh()


class Sizing(Skeleton):
    """A row sees its padded length."""

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(x / x.shape[1])


@pytest.mark.parametrize(
    ("make", "shared"),
    [
        (lambda: build("gpt2"), True),
        (lambda: build("llama"), True),
        (lambda: Mingling().double(), False),
        (lambda: Sizing().double(), False),
    ],
    ids=["gpt2", "llama", "mingling", "sizing"],
)
def test_rows_share_a_forward_where_they_can(make, shared):
    torch.manual_seed(0)
    model, batch = make(), left_padded(ragged())
    assert len(batch) > 1
    assert scaled_error(quietly(model, batch), model, batch, "rejected") <= 1e-6
    assert facts(model).shares_tangents is shared
