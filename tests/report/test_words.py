"""The sentence in the log: at which thresholds it is said, what it says, and how seldom it is said again."""

from __future__ import annotations

from typing import Any

import pytest

from gradent.errors import InputError
from gradent.report.live.alerts import DEFAULT_ALERT, Alert, Alerter, describe
from gradent.report.live.window import Window

NAMES = ("ideal", "both_down", "both_up", "reversed", "inactive")


def window(*steps: tuple[int, dict[str, float]], **fields: Any) -> Window:
    """Steps of `(active pairs, shares)`; what is left is ideal."""
    cases = [dict.fromkeys(NAMES, 0.0) | shares | {"ideal": 1 - sum(shares.values())} for _, shares in steps]
    numbers = [10 * (place + 1) for place in range(len(steps))]
    return Window(steps=numbers, cases=cases, pairs=[pairs for pairs, _ in steps], **fields)


@pytest.mark.parametrize(("case", "least"), [("both_down", 0.5), ("both_up", 0.9), ("reversed", 0.25)])
def test_thresholds(case: str, least: float) -> None:
    assert describe(window((100, {case: least - 0.01})), DEFAULT_ALERT) is None
    said = describe(window((100, {case: least})), DEFAULT_ALERT)
    assert said is not None and f"{least:.0%} of 100 pairs" in said
    mine = Alert(**{case: 0.05})
    assert describe(window((100, {case: 0.04})), mine) is None
    assert describe(window((100, {case: 0.06})), mine) is not None


def test_shares_are_of_all_pairs_not_of_steps() -> None:
    assert describe(window((30, {"both_down": 0.0}), (10, {"both_down": 1.0})), DEFAULT_ALERT) is None
    said = describe(window((10, {"both_down": 0.0}), (30, {"both_down": 1.0})), DEFAULT_ALERT)
    assert said == "steps 10-20: 75% of 40 pairs in case 2 (both fall)"


def test_the_whole_sentence() -> None:
    said = describe(
        window(
            (4, {"both_down": 0.75}),
            chosen_needs=[0.9, 1.5, 4.0],
            weight_ratio=[1.0, 1.0, 0.2],
            layer_inner={
                "model.embed_tokens": 1.0,
                "model.layers.0": 1.0,
                "model.layers.1": 5.0,
                "model.layers.2": 3.0,
            },
        ),
        DEFAULT_ALERT,
    )
    assert said == (
        "step 10: 75% of 4 pairs in case 2 (both fall); chosen would rise if d_w/d_l ≥ 1.5 (median; it is 1); "
        "layers 1-2 hold 80% of the inner product"
    )


def test_what_is_furthest_beyond_its_threshold_is_said() -> None:
    said = describe(window((8, {"both_down": 0.5, "reversed": 0.5})), DEFAULT_ALERT)
    assert said is not None and "case 4 (reversed)" in said


def test_no_remedy_for_a_case_that_needs_none() -> None:
    said = describe(window((4, {"both_up": 1.0}), chosen_needs=[1.0], weight_ratio=[1.0]), DEFAULT_ALERT)
    assert said == "step 10: 100% of 4 pairs in case 3 (both rise)"


def test_quiet_without_an_active_pair() -> None:
    assert describe(window((0, {})), DEFAULT_ALERT) is None
    assert describe(Window(steps=[], cases=[], pairs=[]), DEFAULT_ALERT) is None


@pytest.mark.parametrize(
    ("inner", "where"),
    [
        ({"h.0": 1.0}, "layer 0 holds 100%"),
        ({"h.0": 1.0, "h.1": 1.0, "h.2": 1.0, "h.3": 9.0}, "layer 3 holds 75%"),
        ({"h.0": 4.0, "h.1": 4.0, "h.2": 4.0}, "layers 0-1 hold 67%"),
        ({"h.9": 4.0, "h.10": 4.0, "h.1": 0.1}, "layers 9-10 hold 99%"),
        ({"lm_head": 1.0}, None),
        ({"h.0": -1.0, "h.1": 0.5}, None),  # a negative sum has no shares
        ({"h.0": 1.0, "lm_head": 9.0}, None),
        ({}, None),
    ],
)
def test_the_shortest_run_of_layers(inner: dict[str, float], where: str | None) -> None:
    said = describe(window((4, {"both_down": 1.0}), layer_inner=inner), DEFAULT_ALERT)
    assert said is not None
    if where is None:
        assert "inner product" not in said
    else:
        assert where in said


def test_the_same_is_said_only_now_and_then() -> None:
    bad, good = window((4, {"both_down": 1.0})), window((4, {}))
    alerter = Alerter(Alert(again=4))
    assert [alerter.check(bad) is not None for _ in range(9)] == [True, False, False, False] * 2 + [True]
    alerter = Alerter(Alert(again=4))
    said = [alerter.check(one) is not None for one in (bad, good, bad, good, bad, good, bad)]
    assert said == [True, False, False, False, True, False, False], "a case that comes and goes is not said every time"


def test_another_case_is_news() -> None:
    alerter = Alerter(Alert(again=4))
    windows = [window((4, {case: 1.0})) for case in ("both_down", "reversed", "both_down", "both_up", "reversed")]
    assert [alerter.check(one) is not None for one in windows] == [True, True, False, True, False]


@pytest.mark.parametrize("change", [{"both_down": 0.0}, {"reversed": 1.5}, {"layers": -1.0}, {"again": 0}])
def test_thresholds_that_are_none(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        Alert(**change)


def test_quiet_otherwise() -> None:
    alerter = Alerter(DEFAULT_ALERT)
    for share in (0.0, 0.2, 0.49):
        assert alerter.check(window((100, {"both_down": share}))) is None
