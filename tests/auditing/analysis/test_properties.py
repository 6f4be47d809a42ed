"""Properties of pairs and their rank correlation with the cosine: against plain loops and cases done by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gradent.auditing.analysis.properties import pair_properties, rank_correlation, summarize_properties
from gradent.record import SAMPLE_COLUMNS
from tests.auditing.measured import columns_of, drawn, has_no_nan

NAMES = {
    "edit_distance", "shared_prefix", "shared_suffix", "length_ratio", "length", "chosen_logp", "rejected_logp",
    "margin", "reference_margin",
}  # fmt: skip


def sample_of(columns: dict[str, list[Any]], **given: list[Any]) -> dict[str, list[Any]]:
    """The table of texts that goes with these pairs, with drawn counts of tokens."""
    pairs = len(columns["pair"])
    draw = np.random.default_rng(4)
    lengths = [list(each) for each in (columns["chosen_len"], columns["rejected_len"])]
    shorter = [min(each) for each in zip(*lengths, strict=True)]
    prefix = [int(draw.integers(0, each)) for each in shorter]
    made: dict[str, list[Any]] = {
        name: ["text"] * pairs if kind == "string" else [0] * pairs for name, kind in SAMPLE_COLUMNS.items()
    }
    made |= {"pair": list(columns["pair"]), "chosen_len": lengths[0], "rejected_len": lengths[1]}
    made |= {"shared_prefix": prefix, "shared_suffix": [low - each for low, each in zip(shorter, prefix, strict=True)]}
    made |= {"edit_distance": [int(draw.integers(1, max(each) + 1)) for each in zip(*lengths, strict=True)]}
    return made | given


def find(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["property"] == name)


def levenshtein(first: Sequence[int], second: Sequence[int]) -> int:
    """The textbook's table."""
    line = list(range(len(second) + 1))
    for row, one in enumerate(first, 1):
        before, line[0] = line[0], row
        for column, other in enumerate(second, 1):
            before, line[column] = line[column], min(line[column] + 1, line[column - 1] + 1, before + (one != other))
    return line[-1]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prefix", "suffix", "distance"),
    [
        ([1, 2, 3], [1, 2, 3], 3, 0, 0),
        ([1, 2, 3], [4, 5, 6], 0, 0, 3),
        ([1, 2, 9, 3], [1, 2, 8, 3], 2, 1, 1),
        ([1, 1], [1, 1, 1], 2, 0, 1),  # the end must not overlap the beginning
        ([1, 2, 1], [1, 1], 1, 1, 1),
        ([7], [], 0, 0, 1),
        ([1, 2, 3, 4], [2, 3, 4, 1], 0, 0, 2),
        ([5, 2], [9, 9, 9, 2], 0, 1, 3),
    ],
)
def test_a_pair_by_hand(chosen: list[int], rejected: list[int], prefix: int, suffix: int, distance: int) -> None:
    for first, second in ((chosen, rejected), (rejected, chosen)):
        assert pair_properties(first, second) == {
            "shared_prefix": prefix,
            "shared_suffix": suffix,
            "edit_distance": distance,
        }


RESPONSES = st.lists(st.integers(0, 2), max_size=12)


@given(RESPONSES, RESPONSES)
def test_a_pair_against_the_textbook(chosen: list[int], rejected: list[int]) -> None:
    found = pair_properties(chosen, rejected)
    assert found["edit_distance"] == levenshtein(chosen, rejected)
    prefix, suffix = found["shared_prefix"], found["shared_suffix"]
    shorter = min(len(chosen), len(rejected))
    assert chosen[:prefix] == rejected[:prefix]
    assert prefix == shorter or chosen[prefix] != rejected[prefix]
    rest = [side[prefix:] for side in (chosen, rejected)]
    assert rest[0][len(rest[0]) - suffix :] == rest[1][len(rest[1]) - suffix :]
    assert suffix == min(map(len, rest)) or rest[0][-1 - suffix] != rest[1][-1 - suffix]
    assert found["edit_distance"] <= max(len(chosen), len(rejected)) - prefix - suffix


def test_ids_that_are_large_or_not_lists() -> None:
    assert pair_properties((151_643, 2**31), range(151_643, 151_644))["edit_distance"] == 1
    assert pair_properties(np.array([1, 2]), np.array([1, 3]))["shared_prefix"] == 1  # type: ignore[arg-type]
    assert all(type(value) is int for value in pair_properties([1], [2]).values())


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-40, 40)), min_size=4, max_size=40))
def test_rank_correlation_against_its_definition(points: list[tuple[int, int]]) -> None:
    x, y = np.array(points, float).T
    count = len(points)
    assume(np.ptp(x) > 0 and np.ptp(y) > 0)

    def rank(values: np.ndarray, at: int) -> float:
        return float((values < values[at]).sum() + ((values == values[at]).sum() + 1) / 2)

    ranks = np.array([[rank(x, at), rank(y, at)] for at in range(count)])
    centred = ranks - (count + 1) / 2
    rho = (centred[:, 0] * centred[:, 1]).sum() / math.sqrt((centred[:, 0] ** 2).sum() * (centred[:, 1] ** 2).sum())
    found = rank_correlation(x, y)
    assert found is not None
    assert found[0] == pytest.approx(rho, abs=1e-12)
    assume(abs(rho) < 1 - 1e-9)
    reach = 1.959964 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    assert found[1:] == pytest.approx(
        (math.tanh(math.atanh(rho) - reach), math.tanh(math.atanh(rho) + reach)), abs=1e-6
    )


def test_rank_correlation_without_ties_is_the_formula_of_squared_differences() -> None:
    x = np.arange(8.0)
    y = np.array([2.0, 0.0, 1.0, 4.0, 3.0, 7.0, 5.0, 6.0])
    assert rank_correlation(x, y**3)[0] == pytest.approx(1 - 6 * ((x - y) ** 2).sum() / (8 * 63))  # type: ignore[index]


def test_rank_correlation_at_its_ends() -> None:
    x = np.arange(12.0)
    assert rank_correlation(x, np.exp(x)) == (1.0, None, None)
    assert rank_correlation(x, -x) == (-1.0, None, None)
    assert rank_correlation(x, np.zeros(12)) is None
    assert rank_correlation(np.zeros(0), np.zeros(0)) is None
    assert rank_correlation(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0])) == (pytest.approx(0.5), None, None)


def test_the_interval_holds_what_it_promises() -> None:
    draw = np.random.default_rng(1)
    truth = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's ρ of a bivariate normal with correlation 0.6
    held = 0
    for _ in range(400):
        x = draw.normal(size=60)
        found = rank_correlation(x, 0.6 * x + 0.8 * draw.normal(size=60))
        assert found is not None and found[1] is not None and found[2] is not None
        held += found[1] <= truth <= found[2]
    assert 0.92 <= held / 400 <= 0.98


def test_each_property_is_what_its_unit_says() -> None:
    columns = columns_of(*drawn(30, 0, shared=0.7))
    sample = sample_of(columns)
    rows = summarize_properties(columns, sample)
    assert {row["property"] for row in rows} == NAMES and len(rows) == len(NAMES)
    chosen_len, rejected_len = (np.array(columns[name], float) for name in ("chosen_len", "rejected_len"))
    chosen, rejected, ref_chosen, ref_rejected = (
        np.array(columns[name]) for name in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    )
    counts = {name: np.array(sample[name], float) for name in ("edit_distance", "shared_prefix", "shared_suffix")}
    truth = {
        "edit_distance": counts["edit_distance"] / np.maximum(chosen_len, rejected_len),
        "shared_prefix": counts["shared_prefix"] / np.minimum(chosen_len, rejected_len),
        "shared_suffix": counts["shared_suffix"] / np.minimum(chosen_len, rejected_len),
        "length_ratio": chosen_len / rejected_len,
        "length": chosen_len + rejected_len,
        "chosen_logp": chosen / chosen_len,
        "rejected_logp": rejected / rejected_len,
        "margin": chosen / chosen_len - rejected / rejected_len,
        "reference_margin": (chosen - ref_chosen) - (rejected - ref_rejected),
    }
    for name, values in truth.items():
        row = find(rows, name)
        expected = rank_correlation(values, np.array(columns["cosine"]))
        assert (row["spearman"], row["low"], row["high"]) == pytest.approx(expected), name
        assert (row["groups"][0]["low"], row["groups"][-1]["high"]) == pytest.approx((values.min(), values.max()))
        assert row["pairs"] == 30 == sum(group["pairs"] for group in row["groups"])
    sizes = [abs(row["spearman"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert has_no_nan(rows)


def test_the_sample_is_joined_by_pair_and_may_hold_more() -> None:
    columns = columns_of(*drawn(20, 0, shared=0.7), first=3)
    whole = sample_of(columns_of(*drawn(30, 1)))
    shuffled = np.random.default_rng(0).permutation(30)
    mixed = {name: [values[at] for at in shuffled] for name, values in whole.items()}
    assert summarize_properties(columns, mixed) == summarize_properties(columns, whole)
    alone = {name: values[3:23] for name, values in whole.items()}
    assert summarize_properties(columns, alone) == summarize_properties(columns, whole)


def test_the_four_quarters() -> None:
    columns = columns_of(*drawn(16, 0))
    columns["cosine"] = [at / 16 for at in range(16)]
    columns["case"] = [1] * 4 + [2] * 12
    sample = sample_of(columns, edit_distance=list(range(16)), chosen_len=[20] * 16, rejected_len=[10] * 16)
    row = find(summarize_properties(columns, sample), "edit_distance")
    assert (row["spearman"], row["low"], row["high"], row["reason"]) == (1.0, None, None, None)
    assert row["groups"] == [
        {
            "low": 4 * quarter / 20,
            "high": (4 * quarter + 3) / 20,
            "pairs": 4,
            "cosine": pytest.approx((4 * quarter + 1.5) / 16),
            "ideal": 1.0 if quarter == 0 else 0.0,
        }
        for quarter in range(4)
    ]


@given(st.lists(st.integers(0, 4), min_size=10, max_size=40))
@example([0, 1] * 20)
def test_pairs_of_one_value_stay_in_one_group(values: list[int]) -> None:
    count = len(values)
    columns = columns_of(*drawn(count, 5))
    sample = sample_of(columns, edit_distance=values, chosen_len=[10] * count, rejected_len=[10] * count)
    groups = find(summarize_properties(columns, sample), "edit_distance")["groups"]
    assert sum(group["pairs"] for group in groups) == count
    assert all(one["high"] < other["low"] for one, other in itertools.pairwise(groups))
    mean = sum(group["pairs"] * group["cosine"] for group in groups) / count
    assert mean == pytest.approx(np.mean(columns["cosine"]))


def test_constant_properties_say_so() -> None:
    columns = columns_of(*drawn(12, 0))
    columns |= {"ref_chosen_logp": columns["chosen_logp"], "ref_rejected_logp": columns["rejected_logp"]}
    rows = summarize_properties(columns, sample_of(columns))
    assert rows[-1]["property"] == "reference_margin"
    assert (rows[-1]["spearman"], rows[-1]["low"], rows[-1]["high"]) == (None, None, None)
    assert rows[-1]["reason"] == "the property is the same for all pairs"
    assert [group["pairs"] for group in rows[-1]["groups"]] == [12]
    columns["cosine"] = [0.5] * 12
    rows = summarize_properties(columns, sample_of(columns))
    assert find(rows, "length")["reason"] == "the cosine is the same for all pairs"
    assert has_no_nan(rows)


@pytest.mark.parametrize("pairs", [1, 9])
def test_few_pairs_say_so(pairs: int) -> None:
    columns = columns_of(*drawn(pairs, 0))
    for row in summarize_properties(columns, sample_of(columns)):
        assert (row["spearman"], row["groups"], row["reason"]) == (None, [], "fewer than 10 pairs")
        assert row["pairs"] == pairs


def test_pairs_without_a_cosine_and_no_reference() -> None:
    chosen, rejected = drawn(14, 0)
    chosen[3] = 0.0
    columns = columns_of(chosen, rejected, reference=False)
    rows = summarize_properties(columns, sample_of(columns))
    assert {row["property"] for row in rows} == NAMES - {"reference_margin"}
    assert {row["pairs"] for row in rows} == {13}
    nothing = summarize_properties({name: [] for name in columns}, {name: [] for name in SAMPLE_COLUMNS})
    assert {row["pairs"] for row in nothing} == {0} and has_no_nan(nothing)
