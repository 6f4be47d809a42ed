"""Verdicts: Table 1 and Condition 2 on made-up gradients, then predictions against real steps of a real model."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from gradent import losses
from gradent.errors import InputError, NonFiniteError
from gradent.measurement import measure, sequence_logps
from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch
from gradent.theory.conditions import CASES, Verdict, verdict

F64 = torch.float64


def gram_of(g_w: Tensor, g_l: Tensor, **fields: Tensor) -> PairGram:
    """The gram of given gradients, `[B, P]` each."""
    pairs = len(g_w)
    other = {
        "chosen_logp": torch.full((pairs,), -10.0, dtype=F64),
        "rejected_logp": torch.full((pairs,), -12.0, dtype=F64),
        "chosen_len": torch.full((pairs,), 4),
        "rejected_len": torch.full((pairs,), 5),
    }
    entries = {"chosen_sq": (g_w * g_w).sum(1), "rejected_sq": (g_l * g_l).sum(1), "inner": (g_w * g_l).sum(1)}
    return PairGram(**(entries | other | fields))


def entries(chosen_sq: float, rejected_sq: float, inner: float) -> PairGram:
    given = zip(("chosen_sq", "rejected_sq", "inner"), (chosen_sq, rejected_sq, inner), strict=True)
    zeros = torch.zeros(1, 1, dtype=F64)
    return gram_of(zeros, zeros, **{name: torch.tensor([value], dtype=F64) for name, value in given})


def weights(d_w: float, d_l: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([d_w], dtype=F64), torch.tensor([d_l], dtype=F64)


# Table 1 and Condition 2.


@pytest.mark.parametrize(
    ("chosen_sq", "rejected_sq", "inner", "case"),
    [
        (4.0, 9.0, -3.0, 1),
        (4.0, 9.0, 3.9, 1),
        (4.0, 9.0, 4.0, 1),  # tie: chosen's change is 0, which counts as rising
        (4.0, 9.0, 5.0, 2),
        (9.0, 4.0, 4.0, 1),  # tie: rejected's change is 0, which counts as falling
        (9.0, 4.0, 5.0, 3),
        (4.0, 4.0, 4.0, 1),  # equal gradients: neither moves, under an active loss
        (0.0, 0.0, 0.0, 1),
    ],
)
def test_table_1_for_dpo(chosen_sq, rejected_sq, inner, case):
    reference = torch.tensor([-10.0]), torch.tensor([-12.0])
    result = verdict(entries(chosen_sq, rejected_sq, inner), losses.get("dpo"), *reference)
    assert result.case.tolist() == [case]
    assert result.case.dtype == torch.int64
    assert result.d_w.item() == pytest.approx(0.05)
    assert result.chosen_change.item() == pytest.approx(0.05 * (chosen_sq - inner))
    assert result.rejected_change.item() == pytest.approx(0.05 * (inner - rejected_sq))


@pytest.mark.parametrize(
    ("d_w", "d_l", "case"),
    [
        (1.0, 1.0, 1),
        (1.0, 3.0, 2),
        (5.0, 1.0, 3),
        (-1.0, -1.0, 4),
        (0.0, 0.0, 0),
        (-0.0, 0.0, 0),
        (1.0, 0.0, 3),  # only chosen is pushed: rejected follows it up
        (0.0, 1.0, 2),
        (-1.0, 1.0, 2),
        (1e-300, 0.0, 3),
    ],
)
def test_cases_of_general_weights(d_w, d_l, case):
    assert Verdict.from_weights(entries(4.0, 9.0, 2.0), *weights(d_w, d_l)).case.tolist() == [case]


def test_reversed_needs_a_loss_that_pushes_the_wrong_way():
    """An IPO pair whose margin overshoots its target: both weights are negative."""
    gram = entries(4.0, 9.0, 2.0)
    result = verdict(gram, losses.get("ipo", beta=1.0), torch.tensor([-20.0]), torch.tensor([-12.0]))
    assert result.d_w.item() == -19.0
    assert CASES[result.case.item()] == "reversed"


def test_inactive_pairs_are_counted_apart():
    gram = gram_of(torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64))
    gram = dataclasses.replace(gram, chosen_logp=torch.tensor([-1.0, -1.0, -30.0, -1.0]))
    result = verdict(gram, losses.get("slic", lam=0.0))
    assert (result.case == 0).tolist() == [True, True, False, True]
    assert result.chosen_change[result.case == 0].abs().max() == 0
    assert result.weight_ratio.isnan().tolist() == [True, True, False, True]
    shares = result.fractions()
    assert shares["inactive"] == 0.75
    assert set(shares) == set(CASES.values())
    assert sum(shares.values()) == 1


def test_no_pairs_have_no_shares_and_the_gram_is_not_printed():
    nothing = Verdict.from_weights(gram_of(torch.zeros(0, 3), torch.zeros(0, 3)), torch.zeros(0), torch.zeros(0))
    assert nothing.fractions() == dict.fromkeys(CASES.values(), 0.0)
    assert "case=" in repr(nothing) and "gram" not in repr(nothing)


@pytest.mark.parametrize(
    ("weights_of", "changes", "case"),
    [
        ((1.0, 1.0), (2.0, -3.0), 1),
        ((1.0, 1.0), (-2.0, -3.0), 2),
        ((1.0, 1.0), (2.0, 3.0), 3),
        ((1.0, 1.0), (-2.0, 3.0), 4),
        ((1.0, 1.0), (0.0, 0.0), 1),
        ((0.0, 0.0), (0.0, 0.0), 0),
        ((0.0, 0.0), (-2.0, 0.0), 2),  # weights that cancel over a response's tokens move it all the same
    ],
)
def test_cases_of_changes_that_were_measured(weights_of, changes, case):
    gram, numbers = entries(4.0, 9.0, 2.0), [torch.tensor([value], dtype=F64) for value in changes]
    result = Verdict.from_changes(gram, *weights(*weights_of), *numbers)
    assert result.case.tolist() == [case]
    assert (result.chosen_change.item(), result.rejected_change.item()) == changes
    assert result.has_token_weights and result.chosen_needs.isnan() and result.rejected_needs.isnan()
    assert not Verdict.from_weights(gram, *weights(1.0, 1.0)).has_token_weights
    with pytest.raises(NonFiniteError, match="rejected_change"):
        Verdict.from_changes(gram, *weights(1.0, 1.0), numbers[0], numbers[1] / 0.0 - torch.inf)
    with pytest.raises(InputError, match="one change a pair"):
        Verdict.from_changes(gram, *weights(1.0, 1.0), numbers[0], torch.zeros(2))


def random_verdict(pairs: int = 2000) -> Verdict:
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(pairs, 5, generator=draw, dtype=F64)
    g_w, g_l = (
        shared + torch.rand(pairs, 1, generator=draw, dtype=F64) * torch.randn(pairs, 5, generator=draw, dtype=F64)
        for _ in range(2)
    )
    d_w, d_l = (torch.rand(pairs, generator=draw, dtype=F64) + 1e-3 for _ in range(2))
    return Verdict.from_weights(gram_of(g_w, g_l), d_w, d_l)


def test_changes_are_those_of_a_step_on_a_linear_model():
    """Where log-probs are linear in θ, first order is exact."""
    draw = torch.Generator().manual_seed(1)
    g_w, g_l = (torch.randn(50, 7, generator=draw, dtype=F64) for _ in range(2))
    d_w, d_l = (torch.randn(50, generator=draw, dtype=F64) for _ in range(2))
    step = d_w[:, None] * g_w - d_l[:, None] * g_l
    result = Verdict.from_weights(gram_of(g_w, g_l), d_w, d_l)
    torch.testing.assert_close(result.chosen_change, (g_w * step).sum(1))
    torch.testing.assert_close(result.rejected_change, (g_l * step).sum(1))
    rises, falls = (g_w * step).sum(1) >= 0, (g_l * step).sum(1) <= 0
    name = {(True, True): "ideal", (False, True): "both_down", (True, False): "both_up", (False, False): "reversed"}
    expected = [name[pair] for pair in zip(rises.tolist(), falls.tolist(), strict=True)]
    assert [CASES[number] for number in result.case.tolist()] == expected
    assert set(expected) == set(name.values())


def test_condition_2_thresholds():
    result = random_verdict()
    rises, falls = result.weight_ratio >= result.chosen_needs, result.weight_ratio <= result.rejected_needs
    assert torch.equal(rises, result.chosen_change >= 0)
    assert torch.equal(falls, result.rejected_change <= 0)
    assert all(0.05 < share.double().mean() < 0.95 for share in (rises, falls, rises & falls))
    # Cauchy-Schwarz: with non-negative weights the two cannot both fail, and some ratio always satisfies both.
    assert (rises | falls).all()
    assert (result.chosen_needs <= result.rejected_needs).all()


def test_thresholds_where_a_gradient_or_the_inner_product_is_zero():
    for gram, needs in (
        (entries(4.0, 9.0, -3.0), (-0.75, torch.inf)),
        (entries(4.0, 9.0, 0.0), (0.0, torch.inf)),
        (entries(0.0, 9.0, 0.0), (-torch.inf, torch.inf)),
        (entries(4.0, 0.0, 0.0), (0.0, torch.inf)),
        (entries(4.0, 9.0, 3.0), (0.75, 3.0)),
    ):
        result = Verdict.from_weights(gram, *weights(1.0, 0.0))
        assert (result.chosen_needs.item(), result.rejected_needs.item()) == needs
        assert result.weight_ratio.item() == torch.inf


def test_pairwise_normalized_weights_are_always_ideal():
    """Section 5.1: `d_w/d_l = ‖g_l‖/‖g_w‖` satisfies both conditions whatever the gradients."""
    gram = random_verdict().gram
    result = Verdict.from_weights(gram, gram.chosen_sq.rsqrt(), gram.rejected_sq.rsqrt())
    assert result.fractions()["ideal"] == 1


@pytest.mark.parametrize("field", ["chosen_sq", "rejected_sq", "inner"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_entries_are_named(field, value):
    gram = random_verdict(20).gram
    bad = getattr(gram, field).clone()
    bad[[3, 11]] = value
    gram = dataclasses.replace(gram, **{field: bad})
    with pytest.raises(NonFiniteError, match=f"{field} is nan or inf for pairs 3, 11"):
        verdict(gram, losses.get("slic"))


def test_many_non_finite_pairs_are_counted():
    gram = random_verdict(20).gram
    gram = dataclasses.replace(gram, inner=gram.inner * float("nan"))
    with pytest.raises(NonFiniteError, match=r"pairs 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(20 in all\)"):
        verdict(gram, losses.get("slic"))


def test_bad_arguments():
    gram = random_verdict(3).gram
    with pytest.raises(InputError, match=r"losses\.get"):
        verdict(gram, "dpo")
    with pytest.raises(InputError, match="missing ref_chosen_logp, ref_rejected_logp"):
        verdict(gram, losses.get("dpo"))
    with pytest.raises(InputError, match=r"ref_chosen_logp has shape \[2\]; accepted is \[3\]"):
        verdict(gram, losses.get("dpo"), torch.zeros(2), torch.zeros(3))
    with pytest.raises(InputError, match=r"d_l has shape \[4\] but the gram holds 3 pairs"):
        Verdict.from_weights(gram, torch.ones(3), torch.ones(4))
    with pytest.raises(NonFiniteError, match="d_w is nan or inf for pair 1"):
        Verdict.from_weights(gram, torch.tensor([1.0, torch.nan, 1.0]), torch.ones(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_verdict(3).case = torch.zeros(3)


# Predictions against real steps. The model is GPT-2 in float64, every parameter trainable.

PAIRS = [
    ([1, 40, 41, 42], [50, 51, 52, 53, 54], [60, 51, 52]),
    ([1, 40, 43], [70, 71], [80, 71, 72, 73]),
    ([1, 90, 91], [44], [45]),
    ([1, 90, 91], [44, 30, 31, 32, 33], [45, 30, 31, 32, 33]),
]
STEPS = torch.tensor([2e-3, 1e-3, 5e-4, 2.5e-4], dtype=F64)


def differentiable_logps(model, batch: PairBatch) -> Tensor:
    """Log-prob of every row, `[2B]`, with history; written here so as not to lean on what it checks."""
    ids, marks = batch.input_ids, batch.completion_mask[:, 1:]
    logits = model(input_ids=ids, attention_mask=batch.attention_mask).logits[:, :-1]
    return (torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0] * marks).sum(1)


def realised_changes(model, batch: PairBatch, loss, reference: dict[str, Tensor], pair: int, etas: Tensor) -> Tensor:
    """`[steps, 2]`: change of the pair's chosen and rejected log-prob after one SGD step of each size on its loss."""
    one = batch.select([pair])
    before = torch.stack(sequence_logps(model, one))[:, 0]
    changes = []
    for eta in etas.tolist():
        stepped = copy.deepcopy(model)
        chosen, rejected = differentiable_logps(stepped, one).chunk(2)
        lengths = {"chosen_len": one.chosen_len, "rejected_len": one.rejected_len}
        mine = {name: values[pair : pair + 1] for name, values in reference.items()}
        loss.value(chosen_logp=chosen, rejected_logp=rejected, **mine, **lengths).sum().backward()
        torch.optim.SGD(stepped.parameters(), lr=eta).step()
        changes.append(torch.stack(sequence_logps(stepped, one))[:, 0] - before)
    return torch.stack(changes)


def error_slope(etas: Tensor, realised: Tensor, predicted: Tensor) -> float:
    """The order in η of the prediction's error: 2 where the first order is right, 1 where it is not."""
    errors = (realised - etas[:, None] * predicted).norm(dim=1)
    design = torch.stack([etas.log(), torch.ones_like(etas)], 1)
    return torch.linalg.lstsq(design, errors.log()[:, None]).solution[0].item()


LOSSES = [
    ("dpo", {}),
    ("rdpo", {}),
    ("simpo", {"beta": 2.0}),
    ("ipo", {}),
    ("ipo", {"length_normalized": True}),
    ("rrhf", {}),
    ("slic", {}),
    ("cpo", {}),
    ("dpop", {}),
    ("kto", {"lambda_l": 1.5, "z_ref": 0.1}),
    ("sppo", {}),
    ("sppo", {"reference_free": True, "beta": 0.01}),
]


@pytest.fixture
def batch() -> PairBatch:
    return PairBatch.from_tokens(PAIRS)


@pytest.mark.parametrize(("name", "hyper"), LOSSES, ids=[f"{name}{len(hyper)}" for name, hyper in LOSSES])
def test_predictions_against_a_real_step(name, hyper, tiny_gpt2, batch):
    loss, gram = losses.get(name, **hyper), measure(tiny_gpt2, batch)
    reference = {"ref_chosen_logp": gram.chosen_logp + 0.7, "ref_rejected_logp": gram.rejected_logp - 0.4}
    result = verdict(gram, loss, **reference)
    predicted = torch.stack([result.chosen_change, result.rejected_change], 1)
    for pair in range(len(batch)):
        # Step sizes such that the larger predicted change is 0.002 nats, 0.001, ...: small enough for the square to
        # outweigh the cube of the step (at 0.04 nats it does not always), far above the 1e-14 of rounding.
        etas = STEPS / predicted[pair].abs().max()
        realised = realised_changes(tiny_gpt2, batch, loss, reference, pair, etas)
        assert 1.95 < error_slope(etas, realised, predicted[pair]) < 2.05
        torch.testing.assert_close(realised[-1] / etas[-1], predicted[pair], rtol=0.05, atol=0)
        assert torch.equal(realised[-1].sign(), predicted[pair].sign())
        rises, falls = (realised[-1][0] >= 0).item(), (realised[-1][1] <= 0).item()
        assert result.case[pair] == 1 + (not rises) + 2 * (not falls)


def test_the_check_of_predictions_can_fail(tiny_gpt2, batch):
    """A swapped pair, a flipped sign, an exchanged weight and a dropped cross term are each seen as a slope of 1."""
    loss, gram = losses.get("cpo"), measure(tiny_gpt2, batch)
    d_w, d_l = verdict(gram, loss).d_w, verdict(gram, loss).d_l
    swapped = dataclasses.replace(gram, chosen_sq=gram.rejected_sq, rejected_sq=gram.chosen_sq)
    unentangled = dataclasses.replace(gram, inner=torch.zeros_like(gram.inner))
    flipped = dataclasses.replace(gram, inner=-gram.inner)
    wrong = {
        "swapped pair": Verdict.from_weights(swapped, d_w, d_l),
        "flipped weight": Verdict.from_weights(gram, d_w, -d_l),
        "flipped inner": Verdict.from_weights(flipped, d_w, d_l),
        "exchanged weights": Verdict.from_weights(gram, d_l, d_w),
        "no cross term": Verdict.from_weights(unentangled, d_w, d_l),
    }
    right = verdict(gram, loss)
    for pair in range(len(batch)):
        etas = STEPS / torch.stack([right.chosen_change, right.rejected_change])[:, pair].abs().max()
        realised = realised_changes(tiny_gpt2, batch, loss, {}, pair, etas)
        for what, result in wrong.items():
            predicted = torch.stack([result.chosen_change[pair], result.rejected_change[pair]])
            assert error_slope(etas, realised, predicted) < 1.2, what
