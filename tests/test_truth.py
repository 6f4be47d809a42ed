"""The oracle agrees with arithmetic done by hand, and the checks built on it can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch
from tests.batches import left_padded, ragged, square, uneven
from tests.truth import TOLERANCE, Truth, assert_exact, logp_error, module_error, scaled_error, truth
from tests.zoo import build

LIMIT = max(TOLERANCE.values())


class Unigram(nn.Module):
    """Logits that are one parameter at every position: `∇ log π(y) = Σ_t (onehot(y_t) − softmax)`."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1, 1, 97, dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits.expand(*input_ids.shape, -1)


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    return ragged()


@pytest.fixture(scope="module")
def true(batch: PairBatch) -> Truth:
    return truth(build("gpt2"), batch)


def gram_of(true: Truth, batch: PairBatch, **changes: object) -> PairGram:
    """The truth, or a changed one, as a measurement would return it."""
    names = ("chosen_sq", "rejected_sq", "inner", "chosen_logp", "rejected_logp", "modules")
    fields = {name: getattr(true, name) for name in names} | changes
    return PairGram(chosen_len=batch.chosen_len, rejected_len=batch.rejected_len, **fields)


def test_a_model_solved_by_hand(batch):
    model = Unigram()
    prior = model.logits.detach().softmax(0)

    def gradient(row: int) -> Tensor:
        ids = batch.input_ids[row][batch.completion_mask[row] == 1]
        return torch.bincount(ids, minlength=97).double() - len(ids) * prior

    chosen, rejected = ([gradient(row) for row in rows] for rows in (range(3), range(3, 6)))
    got = truth(model, batch)
    for pair in range(3):
        assert got.chosen_sq[pair].item() == pytest.approx((chosen[pair] @ chosen[pair]).item(), rel=1e-12)
        assert got.rejected_sq[pair].item() == pytest.approx((rejected[pair] @ rejected[pair]).item(), rel=1e-12)
        assert got.inner[pair].item() == pytest.approx((chosen[pair] @ rejected[pair]).item(), rel=1e-12)
    assert list(got.modules) == [""]


def test_padding_does_not_matter(true, batch):
    assert scaled_error(truth(build("gpt2"), left_padded(batch)), true) == 0.0


def test_nothing_of_the_model_is_left_changed(batch):
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    truth(model, batch)
    assert model.training
    assert not model.transformer.h[0].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_truth_passes_its_own_check(true, batch):
    assert_exact(gram_of(true, batch), true, batch, tolerance=0.0)


def test_zeros_are_caught(true, batch):
    zeros = torch.zeros_like(true.inner)
    gram = gram_of(true, batch, chosen_sq=zeros, rejected_sq=zeros, inner=zeros, modules=None)
    assert scaled_error(gram, true) == 1.0
    with pytest.raises(AssertionError, match="scaled errors above"):
        assert_exact(gram, true, batch)


@pytest.mark.parametrize("name", ["chosen_sq", "rejected_sq", "inner"])
def test_zeros_in_one_entry_are_caught(true, batch, name):
    assert scaled_error(gram_of(true, batch, **{name: torch.zeros_like(true.inner)}), true) > LIMIT


def test_a_swapped_pair_is_caught(true, batch):
    order = [1, 0, 2]
    gram = gram_of(true, batch, **{name: getattr(true, name)[order] for name in ("chosen_sq", "rejected_sq", "inner")})
    assert scaled_error(gram, true) > LIMIT


def test_swapped_sides_are_caught(true, batch):
    gram = gram_of(true, batch, chosen_sq=true.rejected_sq, rejected_sq=true.chosen_sq)
    assert scaled_error(gram, true) > LIMIT


@pytest.mark.parametrize("row", range(6))
def test_a_dropped_token_is_caught(true, batch, row):
    marks = batch.completion_mask.clone()
    last = int(marks[row].nonzero().max())
    if marks[row].sum() == 1:
        pytest.skip("a completion of one token has none to spare")
    marks[row, last] = 0
    changed = truth(build("gpt2"), replace(batch, completion_mask=marks))
    assert scaled_error(changed, true) > 1e-3
    assert logp_error(changed, true) > 1e-3


def test_an_error_at_the_tolerance_is_caught(true, batch):
    worse = true.inner + 2e-9 * (true.chosen_sq * true.rejected_sq).sqrt()
    with pytest.raises(AssertionError, match="entries"):
        assert_exact(gram_of(true, batch, inner=worse), true, batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_entries_are_caught(true, batch, value):
    spoilt = true.inner.clone()
    spoilt[1] = value
    assert scaled_error(gram_of(true, batch, inner=spoilt), true) == float("inf")


def test_a_gradient_where_there_is_none_is_caught(true, batch):
    still = replace(true, inner=torch.zeros_like(true.inner), rejected_sq=torch.zeros_like(true.inner))
    assert scaled_error(gram_of(still, batch), still) == 0.0
    assert scaled_error(gram_of(still, batch, rejected_sq=torch.full_like(true.inner, 1e-30)), still) == float("inf")


def test_a_missing_module_and_a_wrong_one_are_caught(true, batch):
    name = next(name for name, entry in true.modules.items() if entry[0].any())
    without = {key: entry for key, entry in true.modules.items() if key != name}
    assert module_error(gram_of(true, batch, modules=without), true) == float("inf")
    moved = without | {"elsewhere": true.modules[name]}
    assert module_error(gram_of(true, batch, modules=moved), true) > 1e-4


def test_incomplete_coverage_is_caught(true, batch):
    with pytest.raises(AssertionError):
        assert_exact(gram_of(true, batch, coverage=0.9), true, batch)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("gpt2", torch.float64, "float64"),
        ("llama", torch.float64, "float32 islands"),
        ("gpt2", torch.float32, "float32"),
        ("llama", torch.bfloat16, "bfloat16"),
    ],
)
def test_the_arithmetic_is_recognised(name, dtype, expected):
    assert truth(build(name, dtype=dtype), ragged(1)).arithmetic == expected


def test_batches_are_what_they_are_said_to_be():
    lengths = {name: make().attention_mask.sum(1).tolist() for name, make in BATCHES.items()}
    assert min(ragged().completion_mask.sum(1)) == 1
    assert len(set(lengths["ragged"])) > 3
    assert set(lengths["square"]) == {6}
    assert sorted(lengths["uneven"]) == [4, 5, 5, 5, 6, 6, 20, 20]
    assert (ragged().input_ids[2][:2] == torch.tensor([77, 0])).all()
    assert left_padded(ragged()).attention_mask[:, -1].all()


BATCHES = {"ragged": ragged, "square": square, "uneven": uneven}
