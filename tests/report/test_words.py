"""The sentence in the log: at which thresholds it is said, what it says, and how seldom it is said again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gradent.errors import InputError
from gradent.record import MOVED_SOURCES
from gradent.report.live.alerts import DEFAULT_ALERT, Alert, Alerter, describe
from gradent.report.live.window import Window

ANY = Alert(pairs=1)
NAMES = ("ideal", "both_down", "both_up", "reversed", "inactive")
ALONE = "each pair alone under plain gradient descent"
NAN = float("nan")


def window(*steps: tuple[int, dict[str, float]], **fields: Any) -> Window:
    """Steps of `(active pairs, shares)`; what is left is ideal."""
    cases = [dict.fromkeys(NAMES, 0.0) | shares | {"ideal": 1 - sum(shares.values())} for _, shares in steps]
    numbers = [10 * (place + 1) for place in range(len(steps))]
    return Window(steps=numbers, cases=cases, pairs=[pairs for pairs, _ in steps], **fields)


def moves(
    chosen: dict[str, list[float]], rejected: dict[str, list[float]] | None = None
) -> dict[str, dict[str, list[float]]]:
    """What moved both sides, a number a step; what is left out is 0, in a step without an account nan."""
    sides = {"chosen": chosen, "rejected": rejected or {source: [0.0] * len(each) for source, each in chosen.items()}}
    rest = [0.0 * number for number in next(iter(chosen.values()))]
    return {side: {source: given.get(source, rest) for source in MOVED_SOURCES} for side, given in sides.items()}


@pytest.mark.parametrize(("case", "least"), [("both_down", 0.5), ("both_up", 0.9), ("reversed", 0.25)])
def test_thresholds(case: str, least: float) -> None:
    assert describe(window((100, {case: least - 0.01})), ANY) is None
    said = describe(window((100, {case: least})), ANY)
    assert said is not None and f"{least:.0%} of 100 pairs" in said
    mine = Alert(pairs=1, **{case: 0.05})
    assert describe(window((100, {case: 0.04})), mine) is None
    assert describe(window((100, {case: 0.06})), mine) is not None


def test_shares_are_of_all_pairs_not_of_steps() -> None:
    assert describe(window((30, {"both_down": 0.0}), (10, {"both_down": 1.0})), ANY) is None
    said = describe(window((10, {"both_down": 0.0}), (30, {"both_down": 1.0})), ANY)
    assert said == f"steps 10-20: 75% of 40 pairs in case 2 (both fall), {ALONE}"


def test_the_whole_sentence() -> None:
    said = describe(
        window(
            (4, {"both_down": 0.75}),
            chosen_needs=[1.1, 1.5, 4.0],
            weight_ratio=[1.0, 1.0, 1.0],
            layer_inner={
                "model.embed_tokens": 1.0,
                "model.layers.0": 1.0,
                "model.layers.1": 5.0,
                "model.layers.2": 3.0,
            },
        ),
        ANY,
    )
    assert said == (
        f"step 10: 75% of 4 pairs in case 2 (both fall), {ALONE}; chosen would rise if d_w/d_l ≥ 1.5 (median over the "
        "pairs in case 2; it is 1); layers 1-2 hold 80% of the inner product"
    )


def test_what_is_furthest_beyond_its_threshold_is_said() -> None:
    said = describe(window((8, {"both_down": 0.5, "reversed": 0.5})), ANY)
    assert said is not None and "case 4 (reversed)" in said


def test_no_remedy_for_a_case_that_needs_none() -> None:
    said = describe(window((4, {"both_up": 1.0}), chosen_needs=[1.0], weight_ratio=[1.0]), ANY)
    assert said == f"step 10: 100% of 4 pairs in case 3 (both rise), {ALONE}"


def test_quiet_without_an_active_pair() -> None:
    assert describe(window((0, {})), ANY) is None
    assert describe(Window(steps=[], cases=[], pairs=[]), ANY) is None


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
    said = describe(window((4, {"both_down": 1.0}), layer_inner=inner), ANY)
    assert said is not None
    if where is None:
        assert "inner product" not in said
    else:
        assert where in said


CHOSEN = {
    "own": [0.41], "partner": [-0.51], "others_chosen": [0.1], "others_rejected": [-0.9], "earlier_batches": [-0.13],
    "momentum": [0.21],
}  # fmt: skip
REJECTED = {"own": [-1.5], "partner": [0.5], "others_rejected": [-0.25], "momentum": [-0.1]}
LEAD = (
    "step 10: chosen -0.82 nats (other pairs -0.93, rejected partner -0.51, momentum +0.21, own +0.41); "
    "rejected -1.4 nats (own -1.5, other pairs -0.25, momentum -0.1, chosen partner +0.5)"
)


def test_the_account_of_a_runs_first_steps_is_not_told() -> None:
    told = window((4, {}), moved=moves(CHOSEN, REJECTED))
    assert describe(replace(told, steps=[4]), ANY) is None
    assert describe(replace(told, steps=[5]), ANY) is not None
    reversed_pairs = replace(window((4, {"reversed": 1.0}), moved=moves(CHOSEN, REJECTED)), steps=[4])
    said = describe(reversed_pairs, ANY)
    assert said is not None and said.startswith("step 4: 100% of 4 pairs in case 4")


def test_an_account_of_a_part_of_the_gradient_says_so() -> None:
    told = window((4, {}), moved=moves(CHOSEN, REJECTED), is_whole=False)
    assert describe(told, ANY) is None, "whether chosen falls is not known"
    said = describe(window((4, {"both_down": 0.75}), moved=moves(CHOSEN, REJECTED), is_whole=False), ANY)
    assert said is not None and f"{LEAD}; without later micro-batches, other ranks" in said


def test_the_sentence_leads_with_what_the_step_does() -> None:
    """What lowers comes first; sources that did nothing are left out; rows of earlier micro-batches are other pairs."""
    moved = moves(CHOSEN, REJECTED)
    assert describe(window((4, {}), moved=moved), ANY) == LEAD
    assert describe(window((4, {}), moved=moved, explained=0.984), ANY) == f"{LEAD}; 98% explained"
    for explained in (-3.2, 0.0, 0.49):
        few = window((4, {"both_down": 0.75}), moved=moved, explained=explained)
        assert describe(few, ANY) is None, "no word of a fall where the account explains little"
        assert describe(few, Alert(pairs=1, explained=0.01)) is None or explained == 0.49
    up = describe(window((4, {"both_up": 1.0}), moved=moved, explained=-3.2), ANY)
    assert up is not None and up.startswith(f"{LEAD}; 0% explained; "), "worse than to predict no change: nothing"
    said = describe(window((4, {"both_down": 0.75}), moved=moved, explained=0.984), ANY)
    assert said == f"{LEAD}; 98% explained; step 10: 75% of 4 pairs in case 2 (both fall), {ALONE}"


def test_a_likelihood_term_is_told_where_the_account_explains_the_run() -> None:
    moved = moves(CHOSEN, REJECTED)
    told = describe(window((4, {}), moved=moved, explained=0.984, nll_weight=(0.0234, 0.011)), ANY)
    assert told is not None and told.startswith(f"{LEAD}; 98% explained; to first order, a likelihood term")
    assert "of weight 0.023 ± 0.01 keeps chosen of pairs outside the batch level" in told
    for explained, weight in (
        (0.89, (0.02, 0.001)),
        (None, (0.02, 0.001)),
        (0.98, (0.0, 0.1)),
        (0.98, (0.02, 0.011)),
        (0.98, None),
    ):
        silent = describe(window((4, {}), moved=moved, explained=explained, nll_weight=weight), ANY)
        assert silent is not None and "likelihood term" not in silent


def test_the_sources_listed_add_up() -> None:
    """Weight decay is among them, and what is below a hundredth of the largest is not worth a word."""
    said = describe(window((4, {}), moved=moves({"own": [-2.0], "weight_decay": [-0.5]})), ANY)
    assert said is not None and "chosen -2.5 nats (own -2, weight decay -0.5)" in said
    said = describe(window((4, {}), moved=moves({"own": [-2.0], "weight_decay": [-0.019]})), ANY)
    assert said is not None and "chosen -2 nats (own -2);" in said


def test_the_sentence_is_of_all_steps_that_have_an_account() -> None:
    """Means over pairs, so that a step of 12 pairs counts three times as much as one of 4."""
    moved = moves({"own": [1.0, -3.0, NAN]}, {"own": [-1.0, 3.0, NAN]})
    said = describe(window((4, {}), (12, {}), (4, {}), moved=moved), ANY)
    assert said == "steps 10-20: chosen -2 nats a step (own -2); rejected +2 nats a step (own +2)"
    none = moves({"own": [NAN, NAN]}, {"own": [NAN, NAN]})
    assert describe(window((4, {}), (4, {}), moved=none), ANY) is None


def test_a_fall_within_the_error_of_its_mean_is_not_said() -> None:
    moved = moves({"own": [-0.5]}, {"own": [0.0]})
    wide = [(-3.5, 1.0), (2.5, -1.0), (-3.5, 1.0), (2.5, -1.0)]
    assert describe(window((4, {}), moved=moved, accounted=wide), ANY) is None
    narrow = [(-0.6, 1.0), (-0.4, -1.0), (-0.6, 1.0), (-0.4, -1.0)]
    said = describe(window((4, {}), moved=moved, accounted=narrow), ANY)
    assert said is not None and said.startswith("step 10: chosen -0.5 ± 0.06 nats (own -0.5)")


def test_too_few_pairs_say_nothing() -> None:
    falling = moves({"own": [-1.0]})
    for pairs, is_said in ((31, False), (32, True)):
        assert (describe(window((pairs, {"both_down": 1.0})), DEFAULT_ALERT) is not None) == is_said
        assert (describe(window((pairs, {}), moved=falling), DEFAULT_ALERT) is not None) == is_said


@pytest.mark.parametrize(
    ("needs", "ratios", "words"),
    [
        ([1.004, 1.004, 1.004], [1.0, 1.0, 1.0], "≥ 1.004 (median over the pairs in case 2; it is 1)"),
        ([1.07, 1.07, 1.07], [1.06, 1.06, 1.06], "≥ 1.07 (median over the pairs in case 2; it is 1.06)"),
        ([2.0, 1.2, 3.0], [1.0, 1.0, 2.0], "were 1.5 times what it is (median over the pairs in case 2)"),
        ([1.0 + 1e-9], [1.0], None),  # nobody can read a difference there
        ([], [], None),
    ],
)
def test_what_it_would_take_is_never_what_is_there(needs: Any, ratios: Any, words: str | None) -> None:
    said = describe(window((4, {"both_down": 1.0}), chosen_needs=needs, weight_ratio=ratios), ANY)
    assert said is not None
    assert "would rise" not in said if words is None else words in said


def test_chosen_falls_by_the_account() -> None:
    falling, rising = moves({"own": [0.5], "momentum": [-0.75]}), moves({"own": [0.5], "momentum": [-0.25]})
    assert describe(window((4, {}), moved=falling), ANY) is not None
    assert describe(window((4, {}), moved=falling), Alert(pairs=1, chosen_falls=0.3)) is None
    assert describe(window((4, {}), moved=rising), ANY) is None
    said = describe(window((4, {"both_down": 1.0}), moved=rising), ANY)
    assert said is not None and said.startswith("step 10: chosen +0.25 nats"), "the step is said beside the case"
    with pytest.raises(InputError, match="chosen_falls"):
        Alert(pairs=1, chosen_falls=-0.1)


def test_a_falling_chosen_is_said_only_now_and_then() -> None:
    falling, rising = (window((4, {}), moved=moves({"own": [value]})) for value in (-1.0, 1.0))
    alerter = Alerter(Alert(pairs=1, again=3))
    assert [alerter.check(falling) is not None for _ in range(7)] == [True, False, False] * 2 + [True]
    alerter = Alerter(Alert(pairs=1, again=3))
    said = [alerter.check(one) is not None for one in (falling, rising, falling, falling)]
    assert said == [True, False, False, True]


def test_the_same_is_said_only_now_and_then() -> None:
    bad, good = window((4, {"both_down": 1.0})), window((4, {}))
    alerter = Alerter(Alert(pairs=1, again=4))
    assert [alerter.check(bad) is not None for _ in range(9)] == [True, False, False, False] * 2 + [True]
    alerter = Alerter(Alert(pairs=1, again=4))
    said = [alerter.check(one) is not None for one in (bad, good, bad, good, bad, good, bad)]
    assert said == [True, False, False, False, True, False, False], "a case that comes and goes is not said every time"


def test_another_case_is_news() -> None:
    alerter = Alerter(Alert(pairs=1, again=4))
    windows = [window((4, {case: 1.0})) for case in ("both_down", "reversed", "both_down", "both_up", "reversed")]
    assert [alerter.check(one) is not None for one in windows] == [True, True, False, True, False]


def test_another_case_is_news_beside_a_chosen_that_falls() -> None:
    falling = moves({"own": [-1.0]})
    alerter = Alerter(Alert(pairs=1, again=4))
    windows = [window((4, shares), moved=falling) for shares in ({}, {}, {"reversed": 1.0}, {"reversed": 1.0}, {}, {})]
    assert [alerter.check(one) is not None for one in windows] == [True, False, True, False, False, False]


@pytest.mark.parametrize("change", [{"both_down": 0.0}, {"reversed": 1.5}, {"layers": -1.0}, {"again": 0}])
def test_thresholds_that_are_none(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        Alert(**change)


def test_quiet_otherwise() -> None:
    alerter = Alerter(ANY)
    for share in (0.0, 0.2, 0.49):
        assert alerter.check(window((100, {"both_down": share}))) is None
