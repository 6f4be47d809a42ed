"""The figures of `summary.json` against numpy and plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gradent.auditing.analysis.distributions import most_entangled, summarize_columns, summarize_modules
from gradent.record import CASE_NAMES, PAIR_COLUMNS

CASES = [1, 2, 3, 4, 0, 1, 1, 2, 3]
P = len(CASES)


def columns(**given: Any) -> dict[str, list[Any]]:
    """Nine pairs, one of them inactive, one without a cosine."""
    draw = np.random.default_rng(0)
    made: dict[str, list[Any]] = {
        name: [1] * P if kind == "int64" else [""] * P if kind == "string" else draw.uniform(0.5, 2.0, P).tolist()
        for name, kind in PAIR_COLUMNS.items()
    }
    made["inner"] = draw.uniform(-1.0, 1.0, P).tolist()
    made["cosine"] = [None, *draw.uniform(-1.0, 1.0, P - 1).tolist()]
    made["case"] = CASES
    made["d_w"][4] = made["d_l"][4] = 0.0
    made["d_w"][5] = -0.1
    made["chosen_change"] = draw.uniform(-1.0, 1.0, P).tolist()
    made["rejected_change"] = draw.uniform(-1.0, 1.0, P).tolist()
    made["chosen_change"][0] = made["rejected_change"][1] = 0.0  # as wanted, as in Condition 2
    return {**made, **given}


def test_cosines() -> None:
    made = columns()
    defined = [value for value in made["cosine"] if value is not None]
    figures = summarize_columns(made)["cosine"]
    assert figures["undefined"] == 1
    assert (figures["min"], figures["max"]) == (min(defined), max(defined))
    for percent in (5, 25, 50, 75, 95):
        assert figures[f"p{percent}"] == pytest.approx(np.percentile(defined, percent))
    assert figures["mean"] == pytest.approx(sum(defined) / len(defined))
    assert figures["share_positive"] == pytest.approx(sum(value > 0 for value in defined) / len(defined))


def test_cases() -> None:
    figures = summarize_columns(columns())["cases"]
    assert {name: each["count"] for name, each in figures.items()} == {
        "ideal": 3, "both_down": 2, "both_up": 2, "reversed": 1, "inactive": 1,
    }  # fmt: skip
    assert all(each["share"] == each["count"] / P for each in figures.values())
    assert list(figures) == list(CASE_NAMES.values())


def test_weights_and_condition_2() -> None:
    made = columns()
    rows = [{name: made[name][row] for name in made} for row in range(P)]
    active = [row for row in rows if row["case"] != 0]
    positive = [row for row in active if row["d_w"] > 0 and row["d_l"] > 0]
    binding = [row for row in positive if row["inner"] > 0]
    assert 0 < len(binding) < len(positive) < len(active) < P
    assert summarize_columns(made)["weights"] == pytest.approx(
        {
            "d_w": np.median([row["d_w"] for row in active]),
            "d_l": np.median([row["d_l"] for row in active]),
            "ratio": np.median([row["d_w"] / row["d_l"] for row in positive]),
            "active": len(active),
            "not_positive": len(active) - len(positive),
            "bound_pairs": len(binding),
            "bound_ratio": np.median([row["d_w"] / row["d_l"] for row in binding]),
            "needs_at_least": np.median([row["inner"] / row["chosen_sq"] for row in binding]),
            "needs_at_most": np.median([row["rejected_sq"] / row["inner"] for row in binding]),
            "balanced_ratio": np.median([math.sqrt(row["rejected_sq"] / row["chosen_sq"]) for row in binding]),
            "share_chosen_rises": np.mean([row["chosen_change"] >= 0 for row in active]),
            "share_rejected_falls": np.mean([row["rejected_change"] <= 0 for row in active]),
        }
    )


def test_the_balanced_ratio_meets_both_conditions_of_a_pair() -> None:
    made = columns(inner=[0.3] * P, chosen_sq=[1.0] * P, rejected_sq=[4.0] * P)
    weights = summarize_columns(made)["weights"]
    assert weights["needs_at_least"] < weights["balanced_ratio"] < weights["needs_at_most"]
    assert weights["balanced_ratio"] == 2.0


def test_norms_and_log_probs() -> None:
    made = columns(ref_chosen_logp=[None] * P, ref_rejected_logp=[-3.0] * P)
    figures = summarize_columns(made)
    for side in ("chosen", "rejected"):
        norms = [math.sqrt(value) for value in made[f"{side}_sq"]]
        assert figures["norms"][f"{side}_mean"] == pytest.approx(np.mean(norms))
        assert figures["norms"][f"{side}_median"] == pytest.approx(np.median(norms))
        assert figures["logps"][f"{side}_logp"] == pytest.approx(np.mean(made[f"{side}_logp"]))
    assert figures["norms"]["inner_mean"] == pytest.approx(np.mean(made["inner"]))
    assert figures["logps"]["ref_chosen_logp"] is None
    assert figures["logps"]["ref_rejected_logp"] == -3.0


def test_nothing_defined_gives_nulls_not_nans() -> None:
    figures = summarize_columns(columns(cosine=[None] * P, case=[0] * P))
    cosine = figures["cosine"]
    assert cosine.pop("undefined") == P
    assert set(cosine.values()) == {None}
    weights = figures["weights"]
    assert {name for name, value in weights.items() if value == 0} == {"active", "not_positive", "bound_pairs"}
    assert {value for value in weights.values() if value != 0} == {None}


def test_most_entangled_pairs() -> None:
    assert most_entangled([0.1, None, -0.5, 0.9, 0.4], 3) == [3, 4, 0]
    assert most_entangled([None, -0.5, 0.0]) == [2, 1]
    assert most_entangled([None]) == []


def test_modules_are_averaged() -> None:
    parts = summarize_modules({"a": [1.0, 3.0, 2.0], "b": [0.5, 1.0, 2.0]}, 4)
    assert parts["a"] == {"cosine_part": 0.25, "chosen_share": 0.75, "rejected_share": 0.5}
    for share in ("chosen_share", "rejected_share"):
        assert sum(part[share] for part in parts.values()) == 1.0
