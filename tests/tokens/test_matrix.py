"""Every entry of the token matrix is what one float64 backward a token says."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import gradent.model.facts
from gradent.errors import GradentWarning, NonFiniteError
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import Factored, Materialized, SparseRows
from gradent.kernels.common.budget import least_budget
from gradent.kernels.common.wanted import Wanted
from gradent.measurement import measure
from gradent.model.facts import computing_dtypes, tolerance
from gradent.pairs.batch import PairBatch
from gradent.tokens.effects import token_effects
from gradent.tokens.gram import TokenGram
from gradent.tokens.ledger import TokenLedger
from gradent.tokens.matrix import measure_tokens
from gradent.tokens.row_pass import NoSharedBackward
from tests.adapters import ADAPTERS, build_adapted
from tests.batches import left_padded, ragged, square
from tests.odd_models import ODD, build_odd
from tests.tokens.token_models import TOKEN_MODELS
from tests.truth import token_gradients, untouched
from tests.zoo import build
from tests.zoo_prints import zoo

MODELS = {
    **TOKEN_MODELS,
    "einsum projections": (lambda: build_odd("einsum projections"), 1e-9),
}


def truth_of(model: nn.Module, batch: PairBatch, pair: int) -> tuple[Tensor, Tensor]:
    return tuple(token_gradients(model.eval(), *batch.row(row)) for row in (pair, len(batch) + pair))


@pytest.mark.parametrize("name", MODELS)
def test_every_entry(name):
    make, limit = MODELS[name]
    batch, model = left_padded(ragged()), make()
    with untouched(model):
        grams = measure_tokens(model, batch, by_module=True)
    whole = measure(model, batch)
    for pair, gram in enumerate(grams):
        chosen, rejected = truth_of(model, batch, pair)
        scale = chosen.norm(dim=1)[:, None] * rejected.norm(dim=1)[None]
        assert ((gram.inner - chosen @ rejected.T).abs() / scale).max() <= limit
        torch.testing.assert_close(gram.chosen_sq, chosen.square().sum(1), rtol=10 * limit, atol=0)
        torch.testing.assert_close(gram.rejected_sq, rejected.square().sum(1), rtol=10 * limit, atol=0)
        norms = (whole.chosen_sq[pair] * whole.rejected_sq[pair]).sqrt()
        assert (gram.inner.sum() - whole.inner[pair]).abs() / norms <= 10 * limit
        torch.testing.assert_close(sum(gram.modules.values()), gram.inner, rtol=1e-9, atol=1e-12)
        ids, marks = batch.row(pair)
        assert torch.equal(gram.chosen_ids, ids[marks])
        assert gram.cosine.shape == (len(chosen), len(rejected))
        assert gram.cosine.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("budget", [512, "64KiB"])
@pytest.mark.parametrize("name", ["gpt2", "llama, biases, tied", "LoRA"])
def test_a_matrix_in_blocks(name, budget):
    model, batch = MODELS[name][0](), square()
    (whole, *_) = measure_tokens(model, batch)
    (blocks, *_) = measure_tokens(model, batch, memory_budget=budget)
    assert_same(blocks, whole)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "LoRA"])
def test_token_by_token(monkeypatch, name):
    """The way for models whose tokens cannot share a backward gives the same, in blocks too, and is announced."""
    model, batch = MODELS[name][0](), square()
    (whole, *_) = measure_tokens(model, batch)
    other = MODELS[name][0]()

    def refuse(*args, **kwargs):
        raise NoSharedBackward("it is a test")

    monkeypatch.setattr("gradent.tokens.matrix.SynchronizedPasses", refuse)
    monkeypatch.setattr("gradent.tokens.matrix.TOKENS", {"cpu": 12, "cuda": 12})
    with pytest.warns(GradentWarning, match="one by one .* it is a test"):
        (single, *_) = measure_tokens(other, batch, memory_budget=512)
    assert_same(single, whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradentWarning)  # said once a model
        measure_tokens(other, ragged(1))


def assert_same(one: TokenGram, other: TokenGram) -> None:
    """Two measurements of one pair, in models with float32 islands too."""
    scale = (other.chosen_sq[:, None] * other.rejected_sq[None]).sqrt()
    assert ((one.inner - other.inner).abs() / scale).max() <= 1e-6
    for name in ("chosen_sq", "rejected_sq"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=0)


def test_a_positions_gradient_is_something_else():
    """The head's own rows alone would sum to the same, and be wrong: the check above is not vacuous."""
    model, batch = build("llama"), ragged(1)
    gram = measure_tokens(model, batch, by_module=True)[0]
    head = gram.modules["lm_head"]
    assert (head - gram.inner).abs().max() > 0.1 * gram.inner.abs().max()


@pytest.mark.parametrize("budget", [1, 64, 2**20])
def test_forms_of_every_kind(budget):
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    forms = [
        [Factored(values(5, 6), values(5, 4))],
        [SparseRows(torch.tensor([0, 5, 5]), values(3, 4))],
        [Materialized(values(6, 4))],
        [Factored(values(2, 6), values(2, 4)), SparseRows(torch.tensor([3]), values(1, 4)), Materialized(values(6, 4))],
    ]
    ledger = Ledger(Wanted.all(5), budget=least_budget(budget, 5))
    dense = torch.zeros(5, 6, 4, dtype=torch.float64)
    for row, parts in enumerate(forms):
        for form in parts:
            ledger.add(0, row, (), form)
            if isinstance(form, Factored):
                dense[row] += form.u.T @ form.v
            elif isinstance(form, SparseRows):
                dense[row].index_add_(0, form.ids, form.values)
            else:
                dense[row] += form.grad
    ledger.finish(0)
    products = ledger.wanted.matrix(ledger.entries[0])
    torch.testing.assert_close(products, dense.flatten(1) @ dense.flatten(1).T)


def test_a_model_that_changed_since_it_was_tried():
    model, batch = build("gpt2"), ragged(1)
    measure_tokens(model, batch)
    hook = model.transformer.h[0].register_forward_hook(lambda module, args, out: _hooked(out))
    try:
        with pytest.warns(GradentWarning, match="registers hooks on tensors"):
            (got,) = measure_tokens(model, batch)
        chosen, rejected = truth_of(model, batch, 0)
    finally:
        hook.remove()
    scale = chosen.norm(dim=1)[:, None] * rejected.norm(dim=1)[None]
    assert ((got.inner - chosen @ rejected.T).abs() / scale).max() <= 1e-9


def _hooked(out):
    hidden = out[0] if isinstance(out, tuple) else out
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: 2 * grad)
    return out


def test_a_matrix_that_does_not_add_up_is_not_returned(monkeypatch):
    model, batch = build("gpt2"), ragged(1)
    (want,) = measure_tokens(build("gpt2"), batch)
    honest = TokenLedger.finish

    def crooked(self: TokenLedger, param: int) -> None:
        honest(self, param)
        self.entries[param].inner.mul_(1.01)

    monkeypatch.setattr(TokenLedger, "finish", crooked)
    with pytest.warns(GradentWarning, match="differs from the pair's inner product"):
        (got,) = measure_tokens(model, batch)
    assert_same(got, want)


def test_causality_is_looked_at_once_a_model_by_whoever_comes_first(monkeypatch):
    model, batch, looks = build("gpt2"), ragged(1), []
    honest = gradent.model.facts.check_causal
    monkeypatch.setattr("gradent.model.facts.check_causal", lambda *given: looks.append(honest(*given)))
    for way in (measure_tokens, measure, token_effects, measure_tokens):
        way(model, batch)
    assert len(looks) == 1
    model.transformer.wte.weight.requires_grad_(False)
    measure_tokens(model, batch)
    assert len(looks) == 2, "with others trainable, an adapter added say, it is looked at again"


def test_agreement_is_what_the_arithmetic_bears():
    def agreement(dtype: torch.dtype) -> float:
        return tolerance("batched rows", computing_dtypes(build("gpt2").to(dtype), torch.device("cpu")))

    assert [agreement(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)] == [1e-6, 1e-4, 0.2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agreement(torch.float32) == agreement(torch.bfloat16) == 0.2


def test_in_step_under_autocast():
    """The model's sum over tokens differs from the pair's inner product by bfloat16's rounding: that is agreement."""
    model, batch = build("llama").float(), ragged(1)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error", GradentWarning)
        (gram,) = measure_tokens(model, batch)
        whole = measure(model, batch)
    norms = (whole.chosen_sq[0] * whole.rejected_sq[0]).sqrt()
    assert (gram.inner.sum() - whole.inner[0]).abs() / norms <= 5e-3


def test_a_non_finite_token_is_named():
    model, batch = build("gpt2"), ragged(2)
    with torch.no_grad():
        model.transformer.wte.weight[batch.row(3)[0][-1]] = float("nan")
    with pytest.raises(NonFiniteError, match="pair"):
        measure_tokens(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo())
def test_every_family_in_step(name):
    check_in_step(build(name))


def check_in_step(model: nn.Module) -> None:
    """It is not measured token by token, and every entry is right."""
    batch = ragged(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradentWarning)
        (gram,) = measure_tokens(model, batch)
    chosen, rejected = truth_of(model, batch, 0)
    scale = chosen.norm(dim=1)[:, None] * rejected.norm(dim=1)[None]
    assert ((gram.inner - chosen @ rejected.T).abs() / scale).max() <= 1e-6
    torch.testing.assert_close(gram.chosen_sq, chosen.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(gram.rejected_sq, rejected.square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_in_step(name):
    check_in_step(build_adapted(name))


@pytest.mark.parametrize("name", sorted(set(ODD) - {"sparse embedding"}))  # sparse gradients have no flat truth
def test_every_odd_model(name):
    check_in_step(build_odd(name))
