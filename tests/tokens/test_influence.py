"""`token_influence` against float64 autograd, a backward a token; NTHR's score against the head's own gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from gradent import GradentWarning, RowBatch, TokenInfluence, measure_rows, token_influence
from gradent.errors import InputError, MemoryBudgetError, ModelError, NonFiniteError
from gradent.tokens import influence as module
from tests.adapters import build_adapted, lora_everywhere
from tests.batches import ragged
from tests.odd_models import build_odd
from tests.truth import token_gradients, untouched
from tests.zoo import build

GROUPS = (
    ([5, 17, 42, 8], [[61, 9, 33, 70, 12, 88], [23], [44, 15, 52, 29], [90, 3], [11, 64]]),
    ([31, 3], [[44, 96, 7], [21, 6]]),  # two positives
    ([77, 0, 26, 50, 13, 91], [[0, 68, 19, 35], [83, 57]]),
)
WEIGHT = (1.5, -0.5, -1.25, 0.75, 0.0, 1.0, 2.0, -0.3, 0.6)
MODELS = {
    "gpt2, tied": (lambda: build("gpt2"), 1e-9),
    "gpt2, untied": (lambda: build("gpt2, untied"), 1e-9),
    "llama": (lambda: build("llama"), 1e-6),
    "llama, LoRA": (lambda: lora_everywhere("llama"), 1e-6),
    "mamba": (lambda: build("mamba"), 1e-6),
    "LoRA on fused experts": (lambda: build_adapted("LoRA on fused experts"), 1e-6),
}


def rows() -> tuple[RowBatch, Tensor]:
    return RowBatch.from_tokens(GROUPS), torch.tensor(WEIGHT, dtype=torch.float64)


def quietly(model: nn.Module, batch: RowBatch, weight: Tensor, **options: object) -> list[TokenInfluence]:
    """`token_influence`, in which a fallback is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradentWarning)
        return token_influence(model, batch, weight, **options)


def gradients(model: nn.Module, batch: RowBatch) -> list[Tensor]:
    """The gradients of every row's tokens, float64 `[T, P]` each."""
    model.eval()
    return [token_gradients(model, *batch.row(row)) for row in range(len(batch))]


def error(
    found: Mapping[tuple[int, int], Tensor], tokens: list[Tensor], weight: Tensor, scale: Tensor | None = None
) -> float:
    """Largest error of an influence, divided by `|weight_j| ‖g_i‖ ‖∇log π(y_j^t)‖`; `scale` is P, as a flat vector."""
    worst = 0.0
    for (i, j), got in found.items():
        left, right = (part if scale is None else part * scale.sqrt() for part in (tokens[i].sum(0), tokens[j]))
        wrong = (got - weight[j] * (right @ left)).abs()
        size = weight[j].abs() * right.norm(dim=1) * left.norm()
        worst = max(worst, float(torch.where(wrong == 0, 0.0, wrong / size).nan_to_num(nan=1.0).max()))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_every_token_has_its_own_gradient_s_product(name: str) -> None:
    make, limit = MODELS[name]
    model, (batch, weight) = make(), rows()
    with untouched(model):
        first, last = quietly(model, batch, weight)
    assert (first.group, first.positives, first.negatives) == (0, (0, 3), (1, 2))
    assert (last.group, last.positives, last.negatives) == (2, (8,), (7,))
    assert set(first.influence) == {(i, j) for i in (0, 3) for j in range(5) if i != j}
    assert set(last.influence) == {(8, 7)}
    found = {**first.influence, **last.influence}
    for (_, j), part in found.items():
        assert part.shape == (int(batch.completion_mask[j].sum()),) and part.dtype == torch.float64
    assert error(found, gradients(model, batch), weight) <= limit
    assert not first.influence[0, 4].any()  # without a weight it does nothing
    wrong = {place: part.flip(0) for place, part in found.items()}
    assert error(wrong, gradients(model, batch), weight) > 0.01


def test_tokens_sum_to_the_products_of_rows() -> None:
    model, (batch, weight) = build("gpt2"), rows()
    products = measure_rows(model, batch).products
    scale = float(products[products.isfinite()].abs().max())
    for group in quietly(model, batch, weight):
        for (i, j), part in group.influence.items():
            assert abs(float(part.sum() - weight[j] * products[i, j])) <= 1e-9 * scale


def test_an_optimizer_s_metric() -> None:
    model, (batch, weight) = build("gpt2, untied"), rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, marks = batch.row(0)
    logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    (-logps @ marks[1:].double()).backward()
    optimizer.step()
    optimizer.zero_grad()
    parts = []
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        parts.append(1 / ((state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8))
    scale = torch.cat([part.flatten() for part in parts])
    found = {}
    for group in quietly(model, batch, weight, metric=optimizer):
        found.update(group.influence)
    tokens = gradients(model, batch)
    assert error(found, tokens, weight, scale) <= 1e-9
    assert error(found, tokens, weight) > 0.01
    products = measure_rows(model, batch, metric=optimizer).products
    for (i, j), part in found.items():
        size = float((products[i, i] * products[j, j]).sqrt() * weight[j].abs())
        assert abs(float(part.sum() - weight[j] * products[i, j])) <= 1e-7 * size


HEADS = {
    "gpt2, untied": ("gpt2, untied", "lm_head.weight", 1e-9),
    "llama": ("llama", "lm_head.weight", 1e-6),
}


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("name", HEADS)
def test_nthr_is_the_head_s_part(name: str, budget: int | None) -> None:
    family, head, limit = HEADS[name]
    model, (batch, weight) = build(family), rows()
    got = quietly(model, batch, weight, memory_budget=budget)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name == head)
    tokens = gradients(model, batch)
    minus = -torch.ones_like(weight)
    for group in got:
        assert group.nthr is not None
        assert set(group.nthr) == {(i, j) for i in group.positives for j in group.negatives}
        assert error({place: -part for place, part in group.nthr.items()}, tokens, minus) <= limit
        # Nothing but the head is trainable now: its part is all there is.
        (alone,) = [each for each in quietly(model, batch, weight) if each.group == group.group]
        assert error(alone.influence, tokens, weight) <= limit
        if len(group.nthr) > 1:
            assert alone.correlation == pytest.approx(1.0, abs=1e-12)


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's ρ where nothing is tied."""
    ranks = [part.argsort().argsort().double() for part in (x, y)]
    return 1 - 6 * float(((ranks[0] - ranks[1]) ** 2).sum()) / (len(x) * (len(x) ** 2 - 1))


def test_correlations_are_spearman_s_over_the_negatives_tokens() -> None:
    model, (batch, weight) = build("gpt2"), rows()
    group, _ = quietly(model, batch, weight)
    tokens = gradients(model, batch)

    def joined(scores: Mapping[tuple[int, int], Tensor], i: int) -> Tensor:
        return torch.cat([scores[i, 1], scores[i, 2]])

    pull = {(i, j): tokens[j] @ tokens[i].sum(0) for i in (0, 3) for j in (1, 2)}
    assert group.nthr is not None
    for i in (0, 3):
        assert group.correlations[i] == pytest.approx(spearman(joined(pull, i), joined(group.nthr, i)))
    both = [joined(scores, 0) + joined(scores, 3) for scores in (pull, group.nthr)]
    assert group.correlation == pytest.approx(spearman(*both))
    assert abs(group.correlation) < 1


def test_a_single_token_has_no_correlation() -> None:
    batch = RowBatch.from_tokens([([5, 17], [[61, 9], [23]])])
    (group,) = quietly(build("gpt2"), batch, torch.tensor([1.0, -1.0]))
    assert math.isnan(group.correlation) and math.isnan(group.correlations[0])
    assert module._ranks(torch.tensor([2.0, 1.0, 2.0, 5.0])).tolist() == [2.5, 1.0, 2.5, 4.0]  # noqa: SLF001


def test_a_model_without_a_forward_derivative_goes_token_by_token() -> None:
    model, (batch, weight) = build_odd("custom autograd function"), rows()
    with pytest.warns(GradentWarning) as caught:
        groups = token_influence(model, batch, weight)
    told = " ".join(str(warning.message) for warning in caught)
    assert "token_influence cannot differentiate this model in forward mode" in told
    assert error({**groups[0].influence, **groups[1].influence}, gradients(model, batch), weight) <= 1e-9


class Headless(nn.Module):
    """A language model that does not say which of its modules is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(99, 8), nn.Linear(8, 99)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.embed(input_ids).cumsum(1).tanh())


def test_a_model_that_hides_its_head_has_no_score() -> None:
    model, (batch, weight) = Headless().double(), rows()
    with pytest.warns(GradentWarning, match="there is no NTHR score"):
        first, last = token_influence(model, batch, weight)
    assert first.nthr is None and math.isnan(first.correlation)
    assert error({**first.influence, **last.influence}, gradients(model, batch), weight) <= 1e-9


def test_no_group_of_both_signs() -> None:
    batch, weight = rows()
    assert token_influence(build("gpt2"), batch, weight.abs()) == []
    assert token_influence(build("gpt2"), batch, 0 * weight) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch, weight: (batch, weight[1:]), r"weight has shape \[8\]; accepted is a tensor \[9\]"),
        (lambda batch, weight: (batch, weight.tolist()), "weight is a list"),
        (lambda batch, weight: (batch, weight / 0), r"weight\[0\] is inf; every weight must be finite"),
        (lambda batch, weight: (ragged(), weight), "batch is a PairBatch; accepted is a RowBatch"),
    ],
)
def test_what_a_user_can_get_wrong(change, message) -> None:
    with pytest.raises(InputError, match=message):
        token_influence(build("gpt2"), *change(*rows()))


def test_models_that_cannot_be_measured() -> None:
    model, (batch, weight) = build("gpt2"), rows()
    with pytest.raises(MemoryBudgetError, match="much"):
        token_influence(model, batch, weight, memory_budget="much")
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        token_influence(model, RowBatch.from_tokens([([1], [[2], [10**6]])]), torch.tensor([1.0, -1.0]))
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"row 0 \(group 0\)"):
        token_influence(model, batch, weight)
    with pytest.raises(ModelError):
        token_influence(model.requires_grad_(False), batch, weight)
