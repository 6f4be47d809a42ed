"""What the summary says of tokens, against the token matrices themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gradent.auditing.analysis.tokens import rank_tokens, summarize_tokens
from gradent.auditing.measuring.tokens import face_tokens, token_rows
from gradent.tokens.gram import TokenGram

RESPONSES = {7: ([1, 2, 3, 4], [1, 5, 3]), 2: ([6, 2], [6, 2, 9, 8]), 5: ([3], [4]), 9: ([1, 2, 3], [4, 2, 6])}


def grams() -> dict[int, TokenGram]:
    """Matrices of real gradients, drawn at random with a leaning, so that the sums do not vanish."""
    draw = torch.Generator().manual_seed(0)
    made = {}
    for pair, (chosen, rejected) in RESPONSES.items():
        sides = [torch.randn(len(ids), 6, generator=draw, dtype=torch.float64) + 0.4 for ids in (chosen, rejected)]
        made[pair] = TokenGram(
            inner=sides[0] @ sides[1].T,
            chosen_sq=sides[0].square().sum(1),
            rejected_sq=sides[1].square().sum(1),
            chosen_ids=torch.tensor(chosen),
            rejected_ids=torch.tensor(rejected),
        )
    return made


def columns(made: dict[int, TokenGram]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Token columns, and pair columns of the same pairs and one more, in another order."""
    blocks = []
    for pair, gram in made.items():
        chosen, rejected = ([f"t{number}" for number in ids.tolist()] for ids in (gram.chosen_ids, gram.rejected_ids))
        own = gram.chosen_sq, gram.rejected_sq  # any numbers: no summary reads them
        blocks.append(token_rows(pair, gram, own, (chosen, rejected)))
    tokens = {name: [value for block in blocks for value in block[name]] for name in blocks[0]}
    pairs = {
        "pair": [*sorted(made), 11],
        "chosen_sq": [*(20.0 + pair for pair in sorted(made)), 1.0],
        "rejected_sq": [*(30.0 - pair for pair in sorted(made)), 1.0],
    }
    return tokens, pairs


def norm(pair: int) -> float:
    return ((20.0 + pair) * (30.0 - pair)) ** 0.5


def test_parts_are_those_of_the_matrices_and_add_to_the_cosine() -> None:
    made = grams()
    figures = summarize_tokens(*columns(made))
    splits = {pair: gram.split() for pair, gram in made.items()}
    inner = {pair: float(gram.inner.sum()) for pair, gram in made.items()}
    for kind in ("identical", "differing"):
        parts = {pair: getattr(split, kind) for pair, split in splits.items()}
        assert figures["cosine"][kind] == pytest.approx(np.mean([parts[pair] / norm(pair) for pair in made]))
        assert figures["sum"][kind] == pytest.approx(sum(parts.values()))
        shares = [parts[pair] / inner[pair] for pair in made]
        for percent in (25, 50, 75):
            assert figures["share"][kind][f"p{percent}"] == pytest.approx(np.percentile(shares, percent))
    assert figures["cosine"]["mean"] == pytest.approx(np.mean([inner[pair] / norm(pair) for pair in made]))
    assert figures["cosine"]["mean"] == pytest.approx(figures["cosine"]["identical"] + figures["cosine"]["differing"])
    assert figures["sum"]["inner"] == pytest.approx(sum(inner.values()))
    identical = sum(split.identical for split in splits.values())
    assert figures["sum"]["identical_share"] == pytest.approx(identical / sum(inner.values()))
    assert figures["cosine"]["identical"] != pytest.approx(figures["cosine"]["differing"])
    assert (figures["pairs"], figures["undefined"]) == (4, 0)
    assert figures["tokens"] == sum(len(side) for both in RESPONSES.values() for side in both)
    assert figures["identical_tokens"] == 2 * sum(split.identical_tokens for split in splits.values())


def test_the_papers_claim_is_counted_over_entries() -> None:
    made = grams()
    figures = summarize_tokens(*columns(made))
    aligned = [float(gram.inner[at]) for gram in made.values() for at in gram.alignment]
    facing = [float(gram.inner[at]) for gram in made.values() for at in face_tokens(gram.alignment, *gram.inner.shape)]
    positive, negative = sum(entry > 0 for entry in aligned), sum(entry < 0 for entry in facing)
    assert figures["aligned"] == {"count": 5, "positive": positive, "share": positive / 5}
    assert figures["facing"] == {"count": 4, "negative": negative, "share": negative / 4}
    assert len(aligned) == 5 and len(facing) == 4
    assert 0 < negative < 4


def test_an_entry_of_zero_is_of_neither_sign() -> None:
    tokens, pairs = columns(grams())
    for name in ("aligned_inner", "facing_inner"):
        tokens[name] = [None if value is None else 0.0 for value in tokens[name]]
    figures = summarize_tokens(tokens, pairs)
    assert (figures["aligned"]["share"], figures["facing"]["share"]) == (0.0, 0.0)


def test_a_pair_without_a_cosine_has_no_part_in_means_and_ranks() -> None:
    made = grams()
    tokens, pairs = columns(made)
    pairs["chosen_sq"][pairs["pair"].index(5)] = 0.0
    for name in ("entanglement", "aligned_inner", "facing_inner"):
        tokens[name] = [
            0.0 if pair == 5 and value is not None else value
            for pair, value in zip(tokens["pair"], tokens[name], strict=True)
        ]
    rest = {pair: gram for pair, gram in made.items() if pair != 5}
    with_it, without = summarize_tokens(tokens, pairs), summarize_tokens(*columns(rest))
    assert (with_it["pairs"], with_it["undefined"], without["undefined"]) == (4, 1, 0)
    for name in ("cosine", "share", "sum", "entangling", "disentangling", "aligned"):
        assert with_it[name] == without[name], name
    assert with_it["facing"]["count"] == without["facing"]["count"] + 1


def test_nothing_defined_gives_nulls() -> None:
    tokens, pairs = columns({5: grams()[5]})
    tokens |= {"entanglement": [0.0, 0.0], "facing_inner": [None, None]}
    figures = summarize_tokens(tokens, {**pairs, "rejected_sq": [0.0] * len(pairs["pair"])})
    assert figures["cosine"] == {"mean": None, "identical": None, "differing": None}
    assert set(figures["share"]["identical"].values()) == {None}
    assert figures["sum"] == {"inner": 0.0, "identical": 0.0, "differing": 0.0, "identical_share": None}
    assert figures["aligned"] == {"count": 0, "positive": 0, "share": None}
    assert figures["facing"] == {"count": 0, "negative": 0, "share": None}
    assert figures["entangling"] == figures["disentangling"] == []


def ranked(rows: list[tuple[int, str, float, bool]], norms: dict[int, float], **options: Any) -> dict[str, Any]:
    names = ("pair", "token", "entanglement", "identical")
    return rank_tokens({name: [row[place] for row in rows] for place, name in enumerate(names)}, norms, **options)


def test_tokens_are_ranked_over_all_pairs_as_parts_of_the_cosine() -> None:
    rows = [(0, "the", 2.0, True), (1, "the", 30.0, False), (0, "a", -1.0, True), (1, "a", -40.0, True)]
    rows += [(1, text, value, False) for text in ("b", "c", "d") for value in (10.0, 20.0)]
    rows += [(1, "once", 1e3, False), (1, "zero", 10.0, False), (1, "zero", -10.0, False)]
    found = ranked(rows, {0: 2.0, 1: 100.0})
    assert found["least_count"] == 2
    assert found["entangling"] == [
        {"token": "the", "count": 2, "identical": 1, "sum": pytest.approx(1.3), "mean": pytest.approx(0.65)},
        *(
            {"token": text, "count": 2, "identical": 0, "sum": pytest.approx(0.3), "mean": pytest.approx(0.15)}
            for text in ("b", "c", "d")
        ),
    ]
    assert found["disentangling"] == [
        {"token": "a", "count": 2, "identical": 2, "sum": pytest.approx(-0.9), "mean": pytest.approx(-0.45)}
    ]
    assert [row["token"] for row in ranked(rows, {0: 2.0, 1: 100.0}, most=2)["entangling"]] == ["the", "b"]


def test_where_hardly_any_token_recurs_all_are_ranked() -> None:
    rows = [(0, "a", 1.0, True), (0, "a", 1.0, True), (0, "b", 3.0, False), (0, "c", -3.0, False)]
    found = ranked(rows, {0: 1.0})
    assert found["least_count"] == 1
    assert [row["token"] for row in found["entangling"]] == ["b", "a"]
    assert [row["token"] for row in found["disentangling"]] == ["c"]


def test_tokens_of_a_pair_without_a_norm_are_left_out() -> None:
    rows = [(0, "a", 1.0, True), (1, "b", 0.0, True)]
    assert [row["token"] for row in ranked(rows, {0: 1.0, 1: 0.0})["entangling"]] == ["a"]
