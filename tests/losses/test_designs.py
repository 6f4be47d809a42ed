"""Section 5's two designs as losses: their weights, their verdicts on real gradients, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gradent import PairBatch, Verdict, losses, measure, verdict
from gradent.auditing.analysis.loss_grid import label_loss, read_hyperparameters
from gradent.errors import InputError, NonFiniteError
from gradent.losses.designs import SCALES, normalized_weights
from gradent.pair_gram import PairGram

BATCH = PairBatch.from_tokens(
    [([1, 30, 31], [40, 41, 50], [42, 41, 50]), ([1, 7], [9, 9, 3, 12], [9, 8]), ([5, 6, 7], [20, 21], [20, 22, 23])]
)
REFERENCE = torch.tensor([-9.0, -14.0, -8.0], dtype=torch.float64), torch.tensor([-8.0, -9.0, -15.0]).double()


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_weights_of_a_pair() -> None:
    norms = column(2.0, 0.0, 0.0), column(8.0, 4.0, 0.0)
    d_w, d_l = torch.full((3,), 0.5, dtype=torch.float64), torch.full((3,), 0.25, dtype=torch.float64)
    c_w, c_l, scales = normalized_weights(*norms, d_w, d_l, scale="loss", factor=1.0)
    assert scales.tolist() == [1.5, 1.0, 0.0]
    assert c_w.tolist() == [0.75, 0.0, 0.0]
    assert c_l.tolist() == [0.1875, 0.25, 0.0]  # beside a response without a gradient: the loss's own weight
    c_w, c_l, scales = normalized_weights(*norms, d_w, d_l, scale="weight", factor=2.0)
    assert (scales[0], c_w[0], c_l[0]) == (0.75, 0.375, 0.09375)
    c_w, c_l, _ = normalized_weights(*norms, d_w, d_l, scale="constant", factor=3.0)
    assert (c_w[0], c_l[0], c_l[1]) == (1.5, 0.375, 0.75)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("base", ["dpo", "simpo", "cpo"])
def test_every_pair_is_in_case_1_and_moves_as_the_normalized_step_says(base: str, scale: str, tiny_gpt2: Any) -> None:
    gram = measure(tiny_gpt2, BATCH)
    loss = losses.get("pairwise_normalized", base=base, scale=scale, C=2.0)
    judged = verdict(gram, loss, *REFERENCE)
    assert judged.case.tolist() == [1, 1, 1]
    n_w, n_l = gram.chosen_sq.sqrt(), gram.rejected_sq.sqrt()
    plain = verdict(gram, loss.base, *REFERENCE)
    c = {"loss": plain.d_w * n_w + plain.d_l * n_l, "weight": plain.d_w + plain.d_l, "constant": torch.full((3,), 2.0)}
    torch.testing.assert_close(judged.d_w, c[scale].double() / n_w)  # C = 2 cancels the half of both means
    torch.testing.assert_close(judged.d_w * n_w, judged.d_l * n_l)
    torch.testing.assert_close(judged.chosen_change, judged.d_w * gram.chosen_sq - judged.d_l * gram.inner)
    torch.testing.assert_close(judged.rejected_change, judged.d_w * gram.inner - judged.d_l * gram.rejected_sq)


def test_parallel_gradients_stay_in_case_1_and_a_target_that_is_passed_reverses() -> None:
    sq = column(1.0, 4.0)
    gram = PairGram(
        chosen_sq=sq, rejected_sq=9 * sq, inner=3 * sq * (1 + 1e-7), chosen_logp=column(-1.0, -1.0),
        rejected_logp=column(-2.0, -50.0), chosen_len=torch.tensor([1, 1]), rejected_len=torch.tensor([1, 1]),
    )  # fmt: skip
    both = torch.zeros(2).double(), torch.zeros(2).double()
    assert verdict(gram, losses.get("dpo"), *both).case.tolist() == [2, 2]
    assert verdict(gram, losses.get("pairwise_normalized"), *both).case.tolist() == [1, 1]
    apart = replace(gram, inner=torch.zeros(2).double())
    passed = verdict(apart, losses.get("pairwise_normalized", base="ipo", beta=0.1), *both)
    assert passed.d_w[0] > 0 > passed.d_w[1]  # IPO wants a margin of 5 nats, and has 49
    assert passed.case.tolist() == [1, 4]


def test_the_design_on_small_missing_and_opposed_gradients() -> None:
    def judge(chosen_sq: float, rejected_sq: float, inner: float, **hyper: Any) -> Verdict:
        gram = PairGram(
            chosen_sq=column(chosen_sq), rejected_sq=column(rejected_sq), inner=column(inner),
            chosen_logp=column(-1.0), rejected_logp=column(-50.0), chosen_len=torch.tensor([1]),
            rejected_len=torch.tensor([1]),
        )  # fmt: skip
        return verdict(gram, losses.get("pairwise_normalized", **hyper), *both)

    both = torch.zeros(1).double(), torch.zeros(1).double()
    small = judge(0.01, 0.04, 0.01, scale="constant", C=0.1)  # a cosine of one half
    torch.testing.assert_close(small.chosen_change, column(0.1 * 0.1 * 0.5))
    torch.testing.assert_close(small.rejected_change, column(-0.1 * 0.2 * 0.5))
    missing = judge(4.0, 0.0, 0.0, scale="constant")
    assert (missing.chosen_change.item(), missing.d_l.item(), missing.case.item()) == (2.0, 0.0, 1)
    opposed = judge(4.0, 9.0, -6.1, scale="constant")  # a cosine below -1 is one of -1
    torch.testing.assert_close(opposed.chosen_change, column(2.0 * 2.0))
    reversed_ = judge(0.01, 0.04, 0.0, base="ipo", beta=0.1, C=0.01)
    assert -1 < reversed_.chosen_change.item() < 0 < reversed_.rejected_change.item() < 1
    assert reversed_.case.item() == 4


def test_what_rounding_leaves_of_a_gradient_is_none() -> None:
    ones = column(1.0, 1.0)
    c_w, c_l, scales = normalized_weights(column(1e-8, 1e-3), ones, ones, ones, scale="loss", factor=1.0)
    assert c_w.tolist() == [0.0, pytest.approx(0.5005 / 1e-3)] and c_l.tolist() == [1.0, pytest.approx(0.5005)]
    assert scales.tolist() == [1.0, pytest.approx(0.5005)]
    nearly = PairGram(
        chosen_sq=column(-1e-18), rejected_sq=column(1.0), inner=column(0.0), chosen_logp=column(-1.0),
        rejected_logp=column(-2.0), chosen_len=torch.tensor([1]), rejected_len=torch.tensor([1]),
    )  # fmt: skip
    assert verdict(nearly, losses.get("pairwise_normalized", scale="constant")).case.tolist() == [1]
    broken = replace(nearly, rejected_sq=column(float("nan")))
    with pytest.raises(NonFiniteError, match=r"rejected_norm is nan or inf for pair 0. Check rejected_sq of the gram"):
        verdict(broken, losses.get("pairwise_normalized", scale="constant"))


def test_the_norms_are_asked_for() -> None:
    loss = losses.get("pairwise_normalized", base="simpo")
    given = {"chosen_logp": [-1.0], "rejected_logp": [-2.0], "chosen_len": [2], "rejected_len": [3]}
    with pytest.raises(InputError, match=r"missing chosen_norm, rejected_norm.*roots of a gram's chosen_sq"):
        loss.weights(**given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"rejected_norm is below 0 for pair 0"):
        loss.weights(**given, chosen_norm=[1.0], rejected_norm=[-1.0])  # type: ignore[arg-type]
    assert loss.needs_norms and loss.needs_lengths and not loss.needs_reference
    assert not losses.get("simpo").needs_norms
    value = losses.get("simpo").value(**given)  # type: ignore[arg-type]
    assert loss.value(**given).equal(value)  # type: ignore[arg-type]
    constant = losses.get("pairwise_normalized", scale="constant")
    assert not constant.needs_reference
    with pytest.raises(InputError, match="the value is that of dpo, which needs ref_chosen_logp"):
        constant.value(chosen_logp=column(-1.0), rejected_logp=column(-2.0))


def test_token_masked_is_exact_on_kept_tokens(tiny_gpt2: Any) -> None:
    marks = BATCH.completion_mask.clone()
    for row in range(len(marks)):  # the first token of every response is kept
        places = marks[row].nonzero().flatten()
        marks[row, places[1:]] = 0
    kept = replace(BATCH, completion_mask=marks)
    gram = measure(tiny_gpt2, kept)
    assert gram.chosen_len.tolist() == [1, 1, 1]
    loss = losses.get("token_masked", beta=0.3)
    judged = verdict(gram, loss, *REFERENCE)

    # A real step of gradient descent on the first pair's masked loss moves its kept log-probs as the verdict says.
    weights = [weight for weight in tiny_gpt2.parameters() if weight.requires_grad]

    def logps() -> torch.Tensor:
        found = []
        for row in (0, 3):
            ids = kept.input_ids[row][kept.attention_mask[row].bool()]
            place = int(marks[row].nonzero()[0])
            found.append(tiny_gpt2(ids[None]).logits[0, place - 1].log_softmax(-1)[ids[place]])
        return torch.stack(found)

    before = logps()
    reference = column(float(REFERENCE[0][0]), float(REFERENCE[1][0]))
    loss_value = -torch.nn.functional.logsigmoid(0.3 * ((before - reference)[0] - (before - reference)[1]))
    grads = torch.autograd.grad(loss_value, weights, allow_unused=True)
    rate = 1e-6
    with torch.no_grad():
        for weight, grad in zip(weights, grads, strict=True):
            if grad is not None:
                weight -= rate * grad
    moved = (logps() - before).detach() / rate
    torch.testing.assert_close(
        moved, torch.stack([judged.chosen_change[0], judged.rejected_change[0]]), rtol=1e-4, atol=0
    )
    value = loss.value(
        chosen_logp=gram.chosen_logp, rejected_logp=gram.rejected_logp, ref_chosen_logp=REFERENCE[0],
        ref_rejected_logp=REFERENCE[1],
    )  # fmt: skip
    torch.testing.assert_close(value[0], loss_value.detach(), rtol=1e-9, atol=0)


def test_get_takes_a_base_by_name_or_whole() -> None:
    loss = losses.get("pairwise_normalized", base="simpo", beta=2.5, C=0.5)
    assert loss.base == losses.get("simpo", beta=2.5) and loss.C == 0.5 and loss.scale == "loss"
    assert losses.get("pairwise_normalized").base == losses.get("dpo")
    own = losses.from_callable(lambda chosen_logp, rejected_logp: (rejected_logp - chosen_logp).sum())
    assert losses.get("token_masked", base=own).base is own
    assert set(losses.DESIGNS) == {"pairwise_normalized", "token_masked"}


@pytest.mark.parametrize(
    ("name", "hyper", "said"),
    [
        ("pairwise_normalized", {"base": "dpoo"}, r"has base 'dpoo'; did you mean 'dpo'\? Accepted: dpo, rdpo"),
        ("pairwise_normalized", {"scale": "long"}, "scale is 'long'; accepted: 'loss', 'weight', 'constant'"),
        ("pairwise_normalized", {"C": 0.0}, "C is 0.0; accepted: a finite number > 0"),
        ("pairwise_normalized", {"gamma": 1.0}, r"pairwise_normalized on dpo has no hyperparameter 'gamma'.*beta=0.1"),
        ("token_masked", {"base": losses.get("dpo"), "beta": 0.3}, "on a base that is given whole has no .* 'beta'"),
        ("token_masked", {"base": losses.get("token_masked")}, "a loss that is no design itself"),
        ("pairwise_normalised", {}, "did you mean 'pairwise_normalized'"),
    ],
)
def test_what_get_refuses(name: str, hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        losses.get(name, **hyper)


def test_how_records_and_tables_name_them() -> None:
    loss = losses.get("pairwise_normalized", base="simpo", beta=2.0, scale="constant")
    found = read_hyperparameters(loss)
    assert found == {"base": "simpo", "beta": 2.0, "gamma": 0.5, "scale": "constant", "C": 1.0}
    assert losses.get("pairwise_normalized", **found) == loss
    assert label_loss(loss) == "Pairwise normalized SimPO (β=2, γ=0.5), scale=constant"
    assert label_loss(losses.get("token_masked")) == "Token-masked DPO (β=0.1)"
