"""Section 4's closed forms against `measure` and autograd, on models built to be the set-ups that the theorems name."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from examples.paper.setups import F64, WIDTH, LearnableHead, LearnableLogits, V
from gradent import losses
from gradent.errors import InputError
from gradent.measurement import measure
from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch
from gradent.theory.closed_forms import Entries, corollary_2, head_gram, theorem_1, theorem_3
from gradent.theory.conditions import verdict


def states(model: LearnableHead, prompt: list[int], response: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """`(hidden, probs, ids)` of a response's tokens."""
    row = torch.tensor([prompt + response])
    with torch.no_grad():
        hidden = model.hidden(row)[0, len(prompt) - 1 : -1]
        return hidden, torch.softmax(model.lm_head(hidden), -1), row[0, len(prompt) :]


def measured(model: nn.Module, prompt: list[int], chosen: list[int], rejected: list[int]) -> PairGram:
    return measure(model, PairBatch.from_tokens([(prompt, chosen, rejected)]))


def assert_entries(theory: Entries, gram: PairGram, tolerance: float = 1e-10) -> None:
    """Equal up to `tolerance` of the gradients' norms, since inner products cancel."""
    norm_w, norm_l = gram.chosen_sq.sqrt(), gram.rejected_sq.sqrt()
    for name, scale in (("chosen_sq", norm_w**2), ("rejected_sq", norm_l**2), ("inner", norm_w * norm_l)):
        error = (getattr(theory, name) - getattr(gram, name)).abs() / scale
        assert error.item() < tolerance, name


# Any softmax head.

RESPONSES = [
    ([3, 4], [5, 6, 7], [5, 8, 7]),
    ([3], [9], [2]),
    ([3, 4, 5], [1, 1, 1, 2, 3], [10]),
    ([0, 11], [4, 5], [4]),
]


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), RESPONSES)
def test_head_gram_equals_measure(prompt, chosen, rejected):
    model = LearnableHead()
    theory = head_gram(*states(model, prompt, chosen), *states(model, prompt, rejected))
    assert_entries(theory, measured(model, prompt, chosen, rejected))


def test_head_gram_is_the_head_of_a_whole_model(tiny_gpt2):
    """On GPT-2 with everything but an untied head frozen, the closed form is the whole Gram."""
    tiny_gpt2.lm_head.weight = nn.Parameter(tiny_gpt2.lm_head.weight.detach().clone())
    for name, parameter in tiny_gpt2.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    prompt, responses = [1, 40, 41], ([50, 51, 52], [60, 51])
    sides = []
    for response in responses:
        row = torch.tensor([prompt + response])
        with torch.no_grad():
            hidden = tiny_gpt2.transformer(row).last_hidden_state[0, len(prompt) - 1 : -1]
            sides += [hidden, torch.softmax(tiny_gpt2.lm_head(hidden), -1), row[0, len(prompt) :]]
    assert_entries(head_gram(*sides), measured(tiny_gpt2, prompt, *responses))


def test_the_check_of_entries_can_fail():
    model = LearnableHead()
    prompt, chosen, rejected = RESPONSES[0]
    gram = measured(model, prompt, chosen, rejected)
    right, other = states(model, prompt, chosen), states(model, prompt, rejected)
    swapped, dropped = head_gram(*other, *right), head_gram(*(part[1:] for part in right), *other)
    flipped = head_gram(*right, *other)._replace(inner=-head_gram(*right, *other).inner)
    for wrong in (swapped, dropped, flipped, Entries(*torch.zeros(3, dtype=F64))):
        with pytest.raises(AssertionError):
            assert_entries(wrong, gram)


# Theorem 1.


@pytest.mark.parametrize("support", [[2, 9], [2, 4, 9], [0, 1, 2, 5, 7, 9, 10], list(range(V))])
def test_theorem_1(support):
    model, prompt = LearnableHead(seed=1), [3, 4, 8]
    model.predict_uniformly(prompt, support)
    hidden = model.hidden(torch.tensor([prompt]))[0, -1]
    gram = measured(model, prompt, [9], [2])
    theory = theorem_1(hidden, len(support))
    assert_entries(theory, gram)
    assert theory.inner < 0
    assert_entries(head_gram(*states(model, prompt, [9]), *states(model, prompt, [2])), gram)
    for loss in (losses.get("slic"), losses.get("cpo"), losses.get("simpo")):
        assert verdict(gram, loss).fractions()["ideal"] == 1


def test_theorem_1_needs_its_assumption():
    """Without the uniform prediction the closed form is another one."""
    model, prompt = LearnableHead(seed=1), [3, 4, 8]
    with pytest.raises(AssertionError):
        assert_entries(theorem_1(model.hidden(torch.tensor([prompt]))[0, -1], V), measured(model, prompt, [9], [2]))


# Corollary 2.


def corollary_case(model: LearnableHead, prompt: list[int], prefix: list[int], support: list[int]) -> Entries:
    hidden, probs, ids = states(model, prompt, [*prefix, 9])
    return corollary_2(hidden, probs[:-1], ids[:-1], 9, 2, torch.tensor(support))


@pytest.mark.parametrize("prefix", [[], [5], [5, 6, 5, 1], [9, 2, 2], [2] * 6])
@pytest.mark.parametrize("support", [[2, 9], [0, 2, 5, 9], list(range(V))])
def test_corollary_2(prefix, support):
    model, prompt = LearnableHead(seed=2), [3, 4]
    model.predict_uniformly(prompt + prefix, support)
    gram = measured(model, prompt, [*prefix, 9], [*prefix, 2])
    theory = corollary_case(model, prompt, prefix, support)
    assert_entries(theory, gram)
    if not prefix:
        assert theory == theorem_1(model.hidden(torch.tensor([prompt]))[0, -1], len(support))


def test_corollary_2_as_printed_where_the_prefix_does_not_lean():
    """Where no shared token prefers either last token, the norms are equal and Condition 1 holds, as the paper says."""
    model, prompt, prefix = LearnableHead(seed=3), [3, 4], [5, 6, 5]
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight[9]
    model.predict_uniformly(prompt + prefix, list(range(V)))
    theory = corollary_case(model, prompt, prefix, list(range(V)))
    hidden = states(model, prompt, [*prefix, 9])[0]
    torch.testing.assert_close(theory.chosen_sq, theory.rejected_sq)
    torch.testing.assert_close(theory.chosen_sq - theory.inner, hidden[-1].square().sum())
    gram = measured(model, prompt, [*prefix, 9], [*prefix, 2])
    assert verdict(gram, losses.get("slic", lam=0.0)).fractions()["ideal"] == 1


@pytest.mark.parametrize(("token", "case"), [(2, "both_down"), (9, "both_up")])
def test_corollary_2_as_printed_fails_on_a_leaning_prefix(token, case):
    """All its assumptions hold, yet the norms differ, Condition 1 fails, and a real step moves both one way."""
    model, prompt, prefix = LearnableHead(seed=2), [token] * 3, [token] * 6
    # Frozen states that hardly change along the prefix, and a head that is uniform everywhere.
    with torch.no_grad():
        model.lm_head.weight.zero_()
    theory = corollary_case(model, prompt, prefix, list(range(V)))
    hidden, probs, ids = states(model, prompt, [*prefix, 9])
    residuals = nn.functional.one_hot(ids[:-1], V) - probs[:-1]
    lean = ((hidden[:-1] @ hidden[-1]) * (residuals[:, 9] - residuals[:, 2])).sum()
    square = hidden[-1].square().sum()
    torch.testing.assert_close(theory.chosen_sq - theory.inner, square + lean)
    torch.testing.assert_close(theory.rejected_sq - theory.inner, square - lean)
    assert lean.abs() > square

    gram = measured(model, prompt, [*prefix, 9], [*prefix, 2])
    assert_entries(theory, gram)
    loss = losses.get("dpo")
    assert verdict(gram, loss, gram.chosen_logp, gram.rejected_logp).fractions()[case] == 1
    changes = []
    for response in ([*prefix, 9], [*prefix, 2]):
        stepped = copy.deepcopy(model)
        dpo_step(stepped, prompt, [*prefix, 9], [*prefix, 2], 1e-3)
        changes.append((token_logps(stepped, prompt, response) - token_logps(model, prompt, response)).sum().item())
    assert [change > 0 for change in changes] == [case == "both_up"] * 2
    assert changes[0] > changes[1]


# Theorem 3.


class SeparateRows(LearnableLogits):
    """The other reading of "learnable logits": every prefix has a row of its own."""

    def __init__(self, length: int, prefixes: list[tuple[int, ...]], seed: int = 0) -> None:
        super().__init__(length, seed)
        self.rows = nn.Parameter(torch.randn(len(prefixes), V, dtype=F64))
        self.number = {prefix: number for number, prefix in enumerate(prefixes)}

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        tokens = input_ids[0].tolist()
        order = [self.number[tuple(tokens[: end + 1])] for end in range(len(tokens))]
        return SimpleNamespace(logits=(self.rows[order] + self.context(input_ids)[0])[None])


def token_logps(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """Log-prob of each response token, `[L]`, with history."""
    row = torch.tensor([prompt + response])
    logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, row[0, len(prompt) :, None])[:, 0]


def dpo_step(model: nn.Module, prompt: list[int], chosen: list[int], rejected: list[int], eta: float) -> None:
    """One SGD step on the DPO loss with the model as its own reference; its weight is β/2 = 0.05."""
    margin = token_logps(model, prompt, chosen).sum() - token_logps(model, prompt, rejected).sum()
    (-nn.functional.logsigmoid(0.1 * (margin - margin.detach()))).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=eta).step()


def distributions(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    row = torch.tensor([prompt + response])
    with torch.no_grad():
        return torch.softmax(model(input_ids=row).logits[0, len(prompt) - 1 : -1], -1)


def token_inner_products(model: nn.Module, prompt: list[int], which: list[int], chosen, rejected) -> Tensor:
    """`⟨∇log π(y^i), ∇(log π_w - log π_l)⟩` of every token of `which`, by one backward a token."""
    margin = token_logps(model, prompt, chosen).sum() - token_logps(model, prompt, rejected).sum()
    direction = torch.autograd.grad(margin, model.rows)[0]
    tokens = token_logps(model, prompt, which)
    gradients = [torch.autograd.grad(token, model.rows, retain_graph=True)[0] for token in tokens]
    return torch.stack([(gradient * direction).sum() for gradient in gradients])


PROMPT = [0]
DIFFER = {
    "middle": ([1, 2, 3, 4, 5, 6], [1, 2, 7, 4, 5, 6], 2),
    "first": ([3, 4, 5], [7, 4, 5], 0),
    "next to last": ([1, 2, 8], [1, 7, 8], 1),
    "last": ([1, 2, 8], [1, 2, 9], 2),
}
every_difference = pytest.mark.parametrize(("chosen", "rejected", "m"), list(DIFFER.values()), ids=list(DIFFER))


def theorem(model: nn.Module, chosen: list[int], rejected: list[int], **scale: float):
    probs = (distributions(model, PROMPT, response) for response in (chosen, rejected))
    return theorem_3(*probs, torch.tensor(chosen), torch.tensor(rejected), **scale)


@every_difference
def test_theorem_3_equals_autograd_on_learnable_logits(chosen, rejected, m):
    model = LearnableLogits(8)
    changes = theorem(model, chosen, rejected)
    for got, which in ((changes.chosen, chosen), (changes.rejected, rejected)):
        torch.testing.assert_close(got, token_inner_products(model, PROMPT, which, chosen, rejected))


@every_difference
def test_theorem_3_equals_its_printed_equations_with_13_corrected(chosen, rejected, m):
    model = LearnableLogits(8)
    s_w, s_l = (distributions(model, PROMPT, response) for response in (chosen, rejected))
    changes = theorem(model, chosen, rejected)
    assert changes.chosen[:m].abs().sum() == 0  # (12), exactly
    assert changes.rejected[:m].abs().sum() == 0
    j, k = chosen[m], rejected[m]
    torch.testing.assert_close(changes.chosen[m], 1 - s_w[m, j] + s_w[m, k])
    torch.testing.assert_close(changes.rejected[m], -(1 + s_w[m, j] - s_w[m, k]))
    printed = 1 + (s_w[m, j] - s_w[m, k])  # (13) has the two exchanged
    torch.testing.assert_close(printed - changes.chosen[m], 2 * (s_w[m, j] - s_w[m, k]))
    assert (printed - changes.chosen[m]).abs() > 1e-3
    for i in range(m + 1, len(chosen)):
        j = chosen[i]
        others = [v for v in range(V) if v != j]
        lead = s_l[i, j] - s_w[i, j]
        for got, s in ((changes.chosen[i], s_w[i]), (changes.rejected[i], s_l[i])):
            tail = sum(s[v] * (s_l[i, v] - s_w[i, v]) for v in others)
            torch.testing.assert_close(got, (1 - s[j]) * lead - tail)  # (14)


@every_difference
def test_theorem_3_against_a_real_dpo_step(chosen, rejected, m):
    """The realised changes approach the predicted ones, with an error that shrinks as the square of the step."""
    model = LearnableLogits(8)
    errors = []
    for eta in (0.2, 0.1, 0.05):
        stepped = copy.deepcopy(model)
        dpo_step(stepped, PROMPT, chosen, rejected, eta)
        changes = theorem(model, chosen, rejected, scale=0.05 * eta)
        realised = [token_logps(stepped, PROMPT, r) - token_logps(model, PROMPT, r) for r in (chosen, rejected)]
        errors.append((torch.cat(realised) - torch.cat(changes)).detach().norm())
    assert 3.9 < errors[0] / errors[1] < 4.1
    assert 3.9 < errors[1] / errors[2] < 4.1


def test_theorem_3_sums_to_the_sentence_level():
    chosen, rejected, _ = DIFFER["middle"]
    model = LearnableLogits(8)
    changes = theorem(model, chosen, rejected)
    g_w, g_l = (
        torch.autograd.grad(token_logps(model, PROMPT, response).sum(), model.rows)[0]
        for response in (chosen, rejected)
    )
    torch.testing.assert_close(changes.chosen.sum(), (g_w * (g_w - g_l)).sum())
    torch.testing.assert_close(changes.rejected.sum(), (g_l * (g_w - g_l)).sum())


def smaug_rows(length: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    """Softmax rows that satisfy Pal et al.'s assumption after m: chosen's context makes the shared token 0 likelier."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(length, V, generator=draw, dtype=F64)
    lifted = logits.clone()
    lifted[m + 1 :, 0] += torch.rand(length - m - 1, generator=draw, dtype=F64)
    return torch.softmax(lifted, -1), torch.softmax(logits, -1)


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.data())
def test_theorem_3_signs_and_the_effect_of_a_longer_suffix(seed, length, data):
    m = data.draw(st.integers(0, length - 1))
    s_w, s_l = smaug_rows(length, m, seed)
    chosen, rejected = torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.long)
    chosen[m], rejected[m] = 3, 4
    changes = theorem_3(s_w, s_l, chosen, rejected)
    assert changes.chosen[m] >= 0 >= changes.rejected[m]
    assert (changes.chosen[m + 1 :] <= 0).all()
    assert (changes.rejected[m + 1 :] <= 0).all()
    shorter = [
        theorem_3(s_w[:end], s_l[:end], chosen[:end], rejected[:end]).chosen.sum() for end in range(m + 1, length + 1)
    ]
    assert all(after <= before for before, after in itertools.pairwise(shorter))


def test_separate_rows_would_not_be_entangled():
    """Why (14) needs one row a position: with a row a prefix, chosen rises after m, by its own gradient's square."""
    torch.manual_seed(0)  # SeparateRows draws its rows; by chance a token's residual can be as small as the bound below
    chosen, rejected, m = DIFFER["middle"]
    rows = [PROMPT + chosen, PROMPT + rejected]
    prefixes = sorted({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})
    model = SeparateRows(8, prefixes)
    inner = token_inner_products(model, PROMPT, chosen, chosen, rejected)
    residuals = nn.functional.one_hot(torch.tensor(chosen), V) - distributions(model, PROMPT, chosen)
    torch.testing.assert_close(inner[m + 1 :], residuals[m + 1 :].square().sum(1))
    changes = theorem(model, chosen, rejected)
    torch.testing.assert_close(changes.chosen[: m + 1], inner[: m + 1])
    assert ((changes.chosen - inner)[m + 1 :].abs() > 0.01).all()


# Bad input.

UNIFORM = torch.full((3, V), 1 / V, dtype=F64)
IDS = torch.tensor([1, 2, 3])
STATES = torch.ones(3, WIDTH, dtype=F64)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: theorem_1(STATES, 4), "hidden has shape"),
        (lambda: theorem_1(STATES[0], 1), "at least 2"),
        (lambda: head_gram(STATES[0], UNIFORM, IDS, STATES, UNIFORM, IDS), "chosen_hidden has shape"),
        (lambda: head_gram(STATES, UNIFORM, IDS[:2], STATES, UNIFORM, IDS), "chosen_ids"),
        (lambda: head_gram(STATES[:2], UNIFORM, IDS, STATES, UNIFORM, IDS), "chosen_hidden has 2 rows"),
        (lambda: head_gram(STATES, UNIFORM, IDS, STATES[:, :2], UNIFORM, IDS), "one head"),
        (lambda: head_gram(STATES, UNIFORM, IDS, STATES, 30 * UNIFORM, IDS), "softmax of the logits"),
        (lambda: head_gram(STATES, UNIFORM, IDS, STATES, UNIFORM, IDS + V), "outside 0..11"),
        (lambda: corollary_2(STATES, UNIFORM, IDS, 1, 2, torch.tensor([1, 2])), "one state more"),
        (lambda: corollary_2(STATES, UNIFORM[1:], IDS[1:], 1, 1, torch.tensor([1, 2])), "two different tokens"),
        (lambda: corollary_2(STATES, UNIFORM[1:], IDS[1:], 1, 2, torch.tensor([1, 3])), "both in a support"),
        (lambda: corollary_2(STATES, UNIFORM[1:], IDS[1:], 1, 2, torch.tensor([1, 2, 2])), "without repeats"),
        (lambda: theorem_3(UNIFORM, UNIFORM[1:], IDS, IDS[1:]), "L tokens"),
        (lambda: theorem_3(UNIFORM, UNIFORM, IDS, IDS), "0 positions"),
        (lambda: theorem_3(UNIFORM, UNIFORM, IDS, IDS.flip(0)), "2 positions"),
        (lambda: theorem_3(UNIFORM, torch.eye(V, dtype=F64)[:3], IDS, torch.tensor([1, 2, 4])), "must be equal"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(InputError, match=said):
        call()
