"""Every entry of the token matrix is what one float64 backward a token says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradent.errors import GradentWarning
from gradent.hooks.cross import CrossLedger
from gradent.hooks.forms import Dense, Explicit, Rows
from gradent.measure import measure
from gradent.pairs import PairBatch
from gradent.tokens import measure_tokens
from tests.adapters import build_adapted
from tests.batches import left_padded, ragged, square
from tests.odd_models import build_odd
from tests.truth import call, untouched
from tests.zoo import build

MODELS = {
    "gpt2": (lambda: build("gpt2"), 1e-9),
    "llama": (lambda: build("llama"), 1e-6),
    "llama, biases, tied": (lambda: build("llama, biases, tied"), 1e-6),
    "mixtral": (lambda: build("mixtral"), 1e-6),
    "mamba": (lambda: build("mamba"), 1e-6),
    "LoRA": (lambda: build_adapted("rsLoRA"), 1e-6),
    "DoRA": (lambda: build_adapted("DoRA"), 1e-6),
    "custom autograd function": (lambda: build_odd("custom autograd function"), 1e-9),
    "einsum projections": (lambda: build_odd("einsum projections"), 1e-9),
}


def token_gradients(model: nn.Module, ids: Tensor, marks: Tensor) -> Tensor:
    """`∇ log π(y^a | x, y^{<a})` of every marked token, `[T, P]` float64, one backward a token."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for position in marks.nonzero()[:, 0].tolist():
        logits = call(model, ids[None])[0, -len(ids) :]
        logp = logits[position - 1].double().log_softmax(-1)[ids[position]]
        grads = torch.autograd.grad(logp, parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=torch.float64) if g is None else g.double().flatten()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows)


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


def test_a_matrix_in_blocks(monkeypatch):
    model, batch = build("gpt2"), square()
    (whole, *_) = measure_tokens(model, batch)
    monkeypatch.setattr("gradent.tokens.TOKENS", {"cpu": 12, "cuda": 12})
    (blocks, *_) = measure_tokens(model, batch, memory_budget=512)
    for name in ("inner", "chosen_sq", "rejected_sq"):
        torch.testing.assert_close(getattr(blocks, name), getattr(whole, name), rtol=1e-9, atol=1e-12)


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
        [Dense(values(5, 6), values(5, 4))],
        [Rows(torch.tensor([0, 5, 5]), values(3, 4))],
        [Explicit(values(6, 4))],
        [Dense(values(2, 6), values(2, 4)), Rows(torch.tensor([3]), values(1, 4)), Explicit(values(6, 4))],
    ]
    ledger = CrossLedger(5, budget=budget)
    dense = torch.zeros(5, 6, 4, dtype=torch.float64)
    for row, parts in enumerate(forms):
        for form in parts:
            ledger.add(0, row, (), form)
            if isinstance(form, Dense):
                dense[row] += form.u.T @ form.v
            elif isinstance(form, Rows):
                dense[row].index_add_(0, form.ids, form.values)
            else:
                dense[row] += form.grad
    ledger.finish(0)
    torch.testing.assert_close(ledger.entries[0], dense.flatten(1) @ dense.flatten(1).T)


def test_a_model_that_changed_since_it_was_tried(monkeypatch):
    model, batch = build("mixtral"), ragged(1)
    (want,) = measure_tokens(model, batch)
    monkeypatch.setattr("gradent.tokens.rows_share", lambda model, parameters: True)
    with pytest.warns(GradentWarning, match="one row a forward"):
        (got,) = measure_tokens(model, batch)
    assert torch.equal(got.inner, want.inner)
