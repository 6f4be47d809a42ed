"""Section 5.2's row of a what-if: against plain gradients, and where it has no numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradent import losses
from gradent.auditing.analysis.recommendation import recommend
from gradent.auditing.analysis.token_masking import mask_changes
from gradent.auditing.analysis.what_if import what_if
from gradent.auditing.measuring.tokens import token_rows
from gradent.report.audit.sections.losses import loss_table
from gradent.tokens.gram import TokenGram
from tests.auditing.measured import columns_of, has_no_nan

RESPONSES = {4: ([7, 1, 2, 3], [8, 1, 2, 3]), 9: ([5, 6], [5, 6, 7]), 2: ([1, 2], [1, 2])}


def made(seed: int = 0, shared: float = 2.0) -> tuple[dict[str, list[Any]], dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Token columns of the pairs of `RESPONSES`, and the gradients that they come from."""
    draw = np.random.default_rng(seed)
    grads, blocks = {}, []
    for pair, (chosen, rejected) in RESPONSES.items():
        common = draw.normal(size=20)
        g_w = draw.normal(size=(len(chosen), 20)) + shared * common
        g_l = draw.normal(size=(len(rejected), 20)) + 2 * shared * common
        grads[pair] = g_w, g_l
        inner, squares = torch.tensor(g_w @ g_l.T), [torch.tensor((g * g).sum(1)) for g in (g_w, g_l)]
        ids = torch.tensor(chosen), torch.tensor(rejected)
        gram = TokenGram(
            inner=inner, chosen_sq=squares[0], rejected_sq=squares[1], chosen_ids=ids[0], rejected_ids=ids[1]
        )
        own = torch.tensor(g_w @ g_w.sum(0)), torch.tensor(g_l @ g_l.sum(0))
        blocks.append(token_rows(pair, gram, own, ([""] * len(chosen), [""] * len(rejected))))
    tokens = {name: [value for block in blocks for value in block[name]] for name in blocks[0]}
    count = len(tokens["pair"])
    return {**tokens, "checkpoint": ["m"] * count, "step": [10] * count}, grads


def kept(pair: int, grads: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of the log-probs of differing tokens, by hand."""
    differing = {4: ([0], [0]), 9: ([], [2]), 2: ([], [])}[pair]
    return grads[0][differing[0]].sum(0), grads[1][differing[1]].sum(0)


def pair_columns(grads: dict[int, tuple[np.ndarray, np.ndarray]]) -> dict[str, list[Any]]:
    """Pair columns of the same pairs, and of one more whose tokens were not measured."""
    whole = [tuple(side.sum(0) for side in grads[pair]) for pair in (2, 4, 9)]
    whole.append((np.eye(20)[0], np.eye(20)[1]))
    columns = columns_of(np.stack([each[0] for each in whole]), np.stack([each[1] for each in whole]), step=10)
    return columns | {"pair": [2, 4, 9, 77]}


@given(st.integers(0, 2**32 - 1))
def test_changes_are_those_of_the_gradients(seed: int) -> None:
    tokens, grads = made(seed)
    found = mask_changes(tokens)
    assert found["pair"].tolist() == sorted(RESPONSES)
    for pair, each in grads.items():
        k_w, k_l = kept(pair, each)
        wanted = [float(side.sum(0) @ (k_w - k_l)) for side in each]
        place = found["pair"].tolist().index(pair)
        changes = found["chosen_change"][place], found["rejected_change"][place]
        assert changes == pytest.approx(tuple(wanted), rel=1e-9, abs=1e-9)


def test_the_row_and_its_cases() -> None:
    tokens, grads = made()
    rows = what_if(pair_columns(grads), losses.get("dpo"), tokens)
    row = rows[-1]
    cases = []
    for pair, each in grads.items():
        k_w, k_l = kept(pair, each)
        up, down = each[0].sum(0) @ (k_w - k_l) >= 0, each[1].sum(0) @ (k_w - k_l) <= 0
        cases.append("inactive" if pair == 2 else {(True, True): "ideal", (False, True): "both_down",
                     (True, False): "both_up", (False, False): "reversed"}[bool(up), bool(down)])  # fmt: skip
    assert row["cases"] == {name: cases.count(name) / 3 for name in row["cases"]}
    assert row["pairs"] == 3 and row["ratio"] == 1.0 and row["within"] is None and row["reason"] is None
    assert row["ideal_by_step"] == [[10, cases.count("ideal") / 3]]
    assert 0 < row["cases"]["inactive"] < 1 and has_no_nan(rows)
    assert set(row["against_run"]) == {"gained", "lost"}
    assert recommend(rows)["design_ideal"] == 1.0  # type: ignore[index]  # the other design's
    assert "(differing tokens kept), 3 pairs" in str(loss_table([row], "Losses").rows)


def test_without_tokens_the_row_says_what_to_do() -> None:
    tokens, grads = made()
    columns = pair_columns(grads)
    for these in (None, {name: [] for name in tokens}):
        row = what_if(columns, losses.get("dpo"), these)[-1]
        assert row["cases"] is None and "--token-pairs" in row["reason"] and row["pairs"] == 0
        assert "--token-pairs" in str(loss_table([row], "Losses").rows)
    old = {**tokens, "own_inner": [None] * len(tokens["pair"])}
    assert "an earlier gradent" in what_if(columns, losses.get("dpo"), old)[-1]["reason"]


def test_where_the_run_cannot_be_judged_there_is_nothing_to_compare_with() -> None:
    tokens, grads = made()
    columns = pair_columns(grads) | {"ref_chosen_logp": [None] * 4, "ref_rejected_logp": [None] * 4}
    row = what_if(columns, losses.get("dpo"), tokens)[-1]
    assert row["cases"] is not None and row["against_run"] is None
