"""Tokens of some pairs: which pairs, rows that are those of `measure_tokens`, and failures that name the row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradent import PairBatch, measure, measure_tokens
from gradent.auditing.measuring import sweep
from gradent.auditing.measuring import tokens as module
from gradent.auditing.measuring.sweep import Sweep
from gradent.auditing.measuring.tokens import (
    choose_pairs,
    face_tokens,
    measure_pair_tokens,
    token_cost,
    token_rows,
)
from gradent.auditing.pipeline import check
from gradent.auditing.state.config import AuditConfig
from gradent.auditing.state.journal import Journal
from gradent.auditing.state.targets import Target
from gradent.distributed import Ranks
from gradent.errors import GradentError, InputError, NonFiniteError
from gradent.loading.preferences import AuditPair
from gradent.loading.source import ModelSource
from gradent.record import TOKEN_COLUMNS
from gradent.tokens.gram import TokenGram, match_tokens
from tests.auditing.made import tokenized

PAIRS = [
    tokenized(7, [1, 30, 31], [40, 41], [42]),
    tokenized(1, [1, 60, 61, 62], [63, 64, 65, 2], [63, 66, 67, 2]),
    tokenized(4, [1, 80, 81], [85, 86, 87, 88], [85, 88, 90]),
]


@pytest.mark.parametrize(
    ("pairs", "count", "chosen"),
    [
        (10, 1, [5]),
        (10, 2, [2, 7]),
        (9, 3, [1, 4, 7]),
        (10, 5, [1, 3, 5, 7, 9]),
        (10, 10, list(range(10))),
        (10, 99, list(range(10))),
        (1, 1, [0]),
        (1, 4, [0]),
    ],
)
def test_chosen_pairs_are_quantiles_of_the_cosine(pairs, count, chosen) -> None:
    cosines = [number / 10 - 0.5 for number in range(pairs)]
    assert choose_pairs(cosines, count) == chosen
    assert choose_pairs(cosines[::-1], count) == sorted(pairs - 1 - place for place in chosen)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40, unique=True), st.integers(1, 45))
def test_chosen_pairs_are_as_many_as_asked_and_as_the_data_is(cosines, count) -> None:
    pairs = len(cosines)
    chosen = choose_pairs(cosines, count)
    assert chosen == sorted(set(chosen)) == choose_pairs(list(cosines), count)
    assert len(chosen) == min(count, pairs)
    ranks = sorted(sorted(cosines).index(cosines[place]) for place in chosen)
    slices = [pairs * number / len(ranks) for number in range(len(ranks) + 1)]
    assert all(low - 1 < rank < high for low, rank, high in zip(slices, ranks, slices[1:], strict=False))


def test_pairs_without_a_cosine_have_their_share() -> None:
    assert choose_pairs([None, 0.5, None, -0.5], 2) == [1, 2]  # the order is 3, 1, 0, 2
    assert choose_pairs([None, None], 1) == [1]
    assert choose_pairs([0.5, 0.5, 0.5, 0.5], 2) == [1, 3]


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_pairs_that_is_none(count, tmp_path) -> None:
    with pytest.raises(InputError, match=rf"token_pairs is {count}; .*--token-pairs"):
        check(AuditConfig(model="", data="", out=tmp_path, token_pairs=count))
    check(AuditConfig(model="", data="", out=tmp_path, token_pairs=1))
    check(AuditConfig(model="", data="", out=tmp_path, token_pairs=None))


FACING: dict[str, tuple[str, str, list[tuple[int, int]]]] = {
    "all differ": ("abc", "xyz", [(0, 0), (1, 1), (2, 2)]),
    "all differ, one longer": ("abc", "x", [(0, 0)]),
    "all equal": ("abc", "abc", []),
    "one replaced in the middle": ("abc", "axc", [(1, 1)]),
    "one replaced at each end": ("abc", "xby", [(0, 0), (2, 2)]),
    "an insertion": ("abc", "abxc", []),
    "an insertion at the start": ("abc", "xabc", []),
    "a continuation": ("ab", "abxy", []),
    "after an insertion": ("abcdq", "axbcdp", [(4, 5)]),
    "gaps of other lengths": ("abc1q", "ax1pr", [(1, 1), (4, 3)]),
    "nothing on one side": ("", "abc", []),
    "nothing at all": ("", "", []),
}


@pytest.mark.parametrize("what", FACING)
def test_which_tokens_face_each_other(what) -> None:
    texts = [list(map(ord, text)) for text in FACING[what][:2]]
    matched = match_tokens(*texts)
    faced = face_tokens(matched, len(texts[0]), len(texts[1]))
    assert faced == FACING[what][2]
    assert not {a for a, _ in faced} & {a for a, _ in matched}
    assert not {b for _, b in faced} & {b for _, b in matched}


def named(tokens: dict[str, list[Any]], row: int, side: str) -> dict[str, list[Any]]:
    """The rows of one side of one pair."""
    keep = [at == (row, side) for at in zip(tokens["pair"], tokens["side"], strict=True)]
    return {name: [value for value, kept in zip(values, keep, strict=True) if kept] for name, values in tokens.items()}


def assert_near(found: list[Any], expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12 * scale)


def own_inner(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """`⟨∇log π(y^a), ∇log π(y)⟩` of every token of a response, by plain autograd."""
    logps = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    picked = logps.gather(1, torch.tensor(response)[:, None])[:, 0]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rows = []
    for logp in picked:
        grads = torch.autograd.grad(logp, weights, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    each = torch.stack(rows).double()
    return each @ each.sum(0)


def test_rows_are_those_of_measure_tokens(tiny_gpt2, tiny_tokenizer) -> None:
    for each in PAIRS:
        tokens = measure_pair_tokens(tiny_gpt2, tiny_tokenizer, each)
        assert set(tokens) == set(TOKEN_COLUMNS) - {"checkpoint", "step"}
        assert set(tokens["pair"]) == {each.row}
        batch = PairBatch.from_tokens([(each.prompt_ids, each.chosen_ids, each.rejected_ids)])
        (gram,) = measure_tokens(tiny_gpt2, batch)
        whole = measure(tiny_gpt2, batch)
        sides = {
            "chosen": (each.chosen_ids, gram.chosen_sq, gram.inner),
            "rejected": (each.rejected_ids, gram.rejected_sq, gram.inner.T),
        }
        for number, (side, (ids, sq, inner)) in enumerate(sides.items()):
            rows = named(tokens, each.row, side)
            assert rows["token_id"] == ids
            assert rows["position"] == list(range(len(ids)))
            assert_near(rows["sq"], sq)
            assert_near(rows["own_inner"], own_inner(tiny_gpt2, each.prompt_ids, ids))
            assert_near(rows["entanglement"], inner.sum(1))
            assert abs(sum(rows["entanglement"]) - float(whole.inner)) <= 1e-9 * float(
                (whole.chosen_sq * whole.rejected_sq).sqrt()
            )
            matched = {at[number]: at[1 - number] for at in gram.alignment}
            faced = {at[number]: at[1 - number] for at in face_tokens(gram.alignment, *gram.inner.shape)}
            assert rows["identical"] == [place in matched for place in range(len(ids))]
            for column, others in (("aligned_inner", matched), ("facing_inner", faced)):
                assert [place for place, entry in enumerate(rows[column]) if entry is not None] == sorted(others)
                for place, other in others.items():
                    assert rows[column][place] == pytest.approx(float(inner[place, other]), rel=1e-9, abs=1e-15)


def test_rows_of_a_matrix_with_known_entries() -> None:
    gram = TokenGram(
        inner=torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=torch.float64),
        chosen_sq=torch.tensor([3.0, 5.0], dtype=torch.float64),
        rejected_sq=torch.tensor([7.0, 9.0, 11.0], dtype=torch.float64),
        chosen_ids=torch.tensor([50, 51]),
        rejected_ids=torch.tensor([60, 61, 51]),
    )
    own = torch.tensor([0.5, 0.25], dtype=torch.float64), torch.tensor([6.0, 7.0, 8.0], dtype=torch.float64)
    assert token_rows(3, gram, own, (["a", "b"], ["x", "y", "b"])) == {
        "pair": [3] * 5,
        "side": ["chosen"] * 2 + ["rejected"] * 3,
        "position": [0, 1, 0, 1, 2],
        "token_id": [50, 51, 60, 61, 51],
        "token": ["a", "b", "x", "y", "b"],
        "identical": [False, True, False, False, True],
        "sq": [3.0, 5.0, 7.0, 9.0, 11.0],
        "entanglement": [7.0, 56.0, 9.0, 18.0, 36.0],
        "aligned_inner": [None, 32.0, None, None, 32.0],
        "facing_inner": [1.0, None, 1.0, None, None],
        "own_inner": [0.5, 0.25, 6.0, 7.0, 8.0],
    }


def test_texts_are_those_of_the_tokenizer(tiny_gpt2, tiny_tokenizer) -> None:
    def ids(text: str) -> list[int]:
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    tokens = measure_pair_tokens(tiny_gpt2, tiny_tokenizer, tokenized(0, [1], ids("a b"), [*ids("é"), 2]))
    assert tokens["token"] == ["a", " ", "b", "\\xc3", "\\xa9", "<eos>"]


def test_the_longest_pair_comes_first_and_the_bar_adds_up(tmp_path, monkeypatch) -> None:
    measured: list[AuditPair] = []
    monkeypatch.setattr(sweep, "open_model", lambda *_, **__: None)
    monkeypatch.setattr(sweep, "measure_pair_tokens", lambda model, tokenizer, pair, **_: measured.append(pair) or {})
    source = ModelSource(base="model", adapter=None, name="model")
    target = Target(name="model", step=0, source=source)
    config: Any = SimpleNamespace(memory_budget=None)
    plan: Any = SimpleNamespace(material=SimpleNamespace(tokenizer=None))
    journal = Journal(tmp_path, "key")
    journal.append("tokens", target.identity, PAIRS[0].row, {})  # measured before
    told: list[tuple[int, int]] = []
    Sweep(
        config=config, plan=plan, journal=journal, ranks=Ranks(), device="cpu", tell=print, failures={}
    ).measure_tokens(target, PAIRS, lambda *done: told.append(done))
    assert measured == sorted(PAIRS[1:], key=token_cost, reverse=True)
    assert told[0] == (1, token_cost(PAIRS[0])) and told[1:] == [(1, token_cost(pair)) for pair in measured]
    assert token_cost(PAIRS[0]) == (4 + 5) + 4


def test_the_memory_budget_is_passed_on(tiny_gpt2, tiny_tokenizer, monkeypatch) -> None:
    seen = []

    def spy(model, batch, **options):
        seen.append(options["memory_budget"])
        return measure_tokens(model, batch, **options)

    monkeypatch.setattr(module, "measure_tokens", spy)
    measure_pair_tokens(tiny_gpt2, tiny_tokenizer, PAIRS[0], memory_budget="64MiB")
    assert seen == ["64MiB"]


def test_what_is_not_finite_names_the_row(tiny_gpt2, tiny_tokenizer) -> None:
    with torch.no_grad():
        tiny_gpt2.get_input_embeddings().weight[80] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^pairs.jsonl:5: "):
        measure_pair_tokens(tiny_gpt2, tiny_tokenizer, PAIRS[2])


@pytest.mark.parametrize("name", ["inner", "chosen_sq", "rejected_sq"])
def test_an_entry_that_is_not_finite_names_the_row(name, tiny_gpt2, tiny_tokenizer, monkeypatch) -> None:
    def overflow(*arguments, **options):
        grams = measure_tokens(*arguments, **options)
        getattr(grams[0], name)[0] = torch.inf
        return grams

    monkeypatch.setattr(module, "measure_tokens", overflow)
    with pytest.raises(NonFiniteError, match=r"^pairs.jsonl:8: .*--dtype float32.*--token-pairs"):
        measure_pair_tokens(tiny_gpt2, tiny_tokenizer, PAIRS[0])


def test_a_device_out_of_memory_says_on_which_pair(tiny_gpt2, tiny_tokenizer, monkeypatch) -> None:
    def fail(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "measure_tokens", fail)
    with pytest.raises(GradentError, match=r"^pairs.jsonl:2: .*out of memory.*8 tokens.*--memory-budget"):
        measure_pair_tokens(tiny_gpt2, tiny_tokenizer, PAIRS[1])
