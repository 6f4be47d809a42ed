"""How log-probs moved against what the theory predicts: on changes that were made by a known step, and on noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradent.auditing.analysis.dynamics import FEWEST_POINTS, dynamics, logged_onset, measured_fall, smooth
from tests.auditing.measured import columns_of, drawn, has_no_nan, stacked

KEYS = {
    "from", "to", "pairs", "chosen_change", "rejected_change", "chosen_predicted", "rejected_predicted", "step_size",
    "explained", "chosen_sign", "rejected_sign", "chosen_signed", "rejected_signed",
}  # fmt: skip


def moved(
    columns: dict[str, list[Any]], step: int, size: float, noise: float = 0.0, seed: int = 0
) -> dict[str, list[Any]]:
    """The next checkpoint after a step of that size on every pair alone, with noise on the log-probs."""
    draw = np.random.default_rng(seed)
    after = {**columns, "step": [step] * len(columns["step"])}
    for side in ("chosen", "rejected"):
        change = size * np.array(columns[f"{side}_change"]) + noise * draw.normal(size=len(columns["pair"]))
        after[f"{side}_logp"] = (np.array(columns[f"{side}_logp"]) + change).tolist()
    return after


def test_a_step_of_known_size_is_found_and_explains_all() -> None:
    first = columns_of(*drawn(30, 0), step=10)
    found = dynamics(stacked(first, moved(first, 20, 0.25)), {})
    assert found is not None
    (interval,) = found["intervals"]
    assert set(interval) == KEYS
    assert (interval["from"], interval["to"], interval["pairs"]) == (10, 20, 30)
    assert interval["step_size"] == pytest.approx(0.25)
    assert interval["explained"] == pytest.approx(1.0)
    assert interval["chosen_sign"] == interval["rejected_sign"] == 1.0
    for side in ("chosen", "rejected"):
        assert interval[f"{side}_change"] == pytest.approx(0.25 * np.mean(first[f"{side}_change"]))
        assert interval[f"{side}_predicted"] == pytest.approx(interval[f"{side}_change"])
    assert found["whole"] == pytest.approx(interval)
    assert has_no_nan(found)


@given(st.integers(0, 2**32 - 1))
def test_the_fit_is_least_squares(seed: int) -> None:
    first = columns_of(*drawn(25, seed), step=1)
    last = moved(first, 2, 5.0, noise=0.3, seed=seed)
    found = dynamics(stacked(first, last), {})
    assert found is not None
    interval = found["intervals"][0]
    sides = ("chosen", "rejected")
    change = np.concatenate([np.subtract(last[f"{side}_logp"], first[f"{side}_logp"]) for side in sides])
    unit = np.concatenate([first[f"{side}_change"] for side in sides])
    size = np.linalg.lstsq(unit[:, None], change, rcond=None)[0][0]
    assert size > 0
    assert interval["step_size"] == pytest.approx(size)
    assert interval["explained"] == pytest.approx(1 - ((change - size * unit) ** 2).sum() / (change**2).sum())
    assert 0 < interval["explained"] < 1
    assert interval["chosen_sign"] == np.mean(np.sign(change[:25]) == np.sign(unit[:25]))
    assert interval["rejected_sign"] == np.mean(np.sign(change[25:]) == np.sign(unit[25:]))
    assert (interval["chosen_signed"], interval["rejected_signed"]) == (25, 25)


def test_the_wrong_way_is_no_negative_step() -> None:
    first = columns_of(*drawn(20, 1), step=1)
    interval = dynamics(stacked(first, moved(first, 2, -0.3)), {})["intervals"][0]  # type: ignore[index]
    assert (interval["step_size"], interval["explained"]) == (0.0, 0.0)
    assert (interval["chosen_predicted"], interval["rejected_predicted"]) == (0.0, 0.0)
    assert interval["chosen_sign"] == interval["rejected_sign"] == 0.0


def test_the_whole_sums_the_intervals() -> None:
    first = columns_of(*drawn(30, 2), step=0)
    second = moved(first, 10, 0.2) | {
        name: columns_of(*drawn(30, 3))[name] for name in ("chosen_change", "rejected_change")
    }
    third = moved(second, 30, 0.5)
    found = dynamics(stacked(third, first, second), {})
    assert found is not None
    assert [(each["from"], each["to"]) for each in found["intervals"]] == [(0, 10), (10, 30)]
    assert [each["step_size"] for each in found["intervals"]] == pytest.approx([0.2, 0.5])
    whole = found["whole"]
    assert set(whole) == KEYS
    assert (whole["from"], whole["to"], whole["step_size"]) == (0, 30, pytest.approx(0.7))
    assert whole["explained"] == pytest.approx(1.0) and whole["chosen_sign"] == 1.0
    for side in ("chosen", "rejected"):
        for what in ("change", "predicted"):
            assert whole[f"{side}_{what}"] == pytest.approx(sum(each[f"{side}_{what}"] for each in found["intervals"]))


def test_a_whole_that_comes_back_is_not_explained() -> None:
    first = columns_of(*drawn(30, 2), step=0)
    back = {name: [-value for value in first[name]] for name in ("chosen_change", "rejected_change")}
    second = moved(first, 1, 0.2) | back
    third = moved(second, 2, 0.2)
    third["chosen_logp"] = [value + 0.01 for value in third["chosen_logp"]]
    found = dynamics(stacked(first, second, third), {})
    assert found is not None
    assert all(each["explained"] > 0.9 for each in found["intervals"])
    assert found["whole"]["explained"] < 0.9
    assert found["whole"]["chosen_change"] == pytest.approx(0.01)


def test_only_pairs_present_at_both_ends() -> None:
    first = columns_of(*drawn(30, 0), step=1)
    whole = moved(first, 2, 0.1)
    some = {name: values[4:11] for name, values in whole.items()}  # a stopped audit
    other = {name: values[8:20] for name, values in moved(whole, 3, 0.1).items()}
    found = dynamics(stacked(first, some, other), {})
    assert found is not None
    assert [each["pairs"] for each in found["intervals"]] == [7, 3]
    assert found["whole"]["pairs"] == 3
    assert found["intervals"][0]["chosen_change"] == pytest.approx(0.1 * np.mean(first["chosen_change"][4:11]))
    apart = {name: values[20:] for name, values in whole.items()}
    found = dynamics(stacked({name: values[:5] for name, values in first.items()}, apart), {})
    assert found is not None and has_no_nan(found)
    interval = found["intervals"][0]
    assert interval.pop("pairs") == 0
    assert {value for name, value in interval.items() if name not in {"from", "to"}} == {None}
    assert found["cases_realised"] is None and found["onset"]["measured"] is None


def test_all_inactive_and_nothing_moved() -> None:
    first = columns_of(*drawn(5, 0), step=1)
    still = {name: [0.0] * 5 for name in ("chosen_change", "rejected_change")}
    frozen = dynamics(stacked(first, moved(first, 2, 0.0)), {})
    assert frozen is not None
    assert (frozen["intervals"][0]["step_size"], frozen["intervals"][0]["explained"]) == (0.0, None)
    assert frozen["cases_realised"] == {"ideal": 0, "both_down": 0, "both_up": 0, "reversed": 0, "inactive": 1}
    inactive = dynamics(stacked(first | still, moved(first, 2, 0.1)), {})
    assert inactive is not None
    interval = inactive["intervals"][0]
    assert (interval["step_size"], interval["explained"], interval["chosen_predicted"]) == (None, 0.0, 0.0)
    assert (interval["chosen_sign"], interval["rejected_sign"]) == (None, None)
    assert has_no_nan([frozen, inactive])


def test_cases_by_what_happened() -> None:
    first = columns_of(*drawn(8, 0), step=1)
    last = moved(first, 2, 0.0)
    by = [(1, -1), (1, 0), (0, -1), (-1, -1), (-1, 0), (1, 1), (-1, 1), (0, 0)]
    for column, side in enumerate(("chosen", "rejected")):
        last[f"{side}_logp"] = [value + change[column] for value, change in zip(first[f"{side}_logp"], by, strict=True)]
    found = dynamics(stacked(first, last), {})
    assert found is not None
    assert found["cases_realised"] == {
        "ideal": 3 / 8,
        "both_down": 2 / 8,
        "both_up": 1 / 8,
        "reversed": 1 / 8,
        "inactive": 1 / 8,
    }


def path(falls: list[tuple[float, float]], pairs: int = 20, **given: Any) -> dict[str, list[Any]]:
    """Checkpoints at 10, 20, ... whose log-probs lie that far from their start, with a little of each pair's own."""
    draw = np.random.default_rng(0)
    first = columns_of(*drawn(pairs, 0), **given)
    made = []
    for number, fall in enumerate(falls, 1):
        each = {**first, "step": [10 * number] * pairs}
        for side, change in zip(("chosen", "rejected"), fall, strict=True):
            own = draw.normal(0, 0.05, pairs) if number > 1 else 0.0
            each[f"{side}_logp"] = (np.array(first[f"{side}_logp"]) + change + own).tolist()
        made.append(each)
    return stacked(*made)


@pytest.mark.parametrize(
    ("falls", "onset"),
    [
        ([(0, 0), (1, -1), (-1, -2), (-2, -3)], 20),  # from the best of chosen, not from what was gained before it
        ([(0, 0), (-1, -1), (1, -2), (-2, -3)], 30),
        ([(0, 0), (4, 3), (2, 1), (1, 0.5)], 20),  # both still above the start
        ([(0, 0), (-1, -1), (-2, -2)], 10),
        ([(0, 0), (0, 0), (-2, -2)], 20),  # what has not clearly fallen yet is no part of the fall
        ([(0, 0), (-2, -2), (-1, -1)], 10),
        ([(0, 0), (-1, -1), (0.5, -2)], None),
        ([(0, 0), (1, -1), (2, -2)], None),
    ],
)
def test_measured_onset(falls: list[tuple[float, float]], onset: int | None) -> None:
    found = dynamics(path(falls, reference=False), {})
    assert found is not None
    assert found["onset"] == {"measured": onset, "logged": None, "logged_keys": []}
    assert found["start"] is None
    curve = [(point["chosen"], point["rejected"]) for point in found["curve"]]
    np.testing.assert_allclose(curve, np.array(falls) - falls[0], atol=0.08)
    if onset is None:
        assert found["fall"] is None
    else:
        lost = np.array(falls[-1]) - falls[onset // 10 - 1]
        fall = found["fall"]
        np.testing.assert_allclose([fall["chosen"], fall["rejected"]], lost, atol=0.08)
        assert (fall["from"], fall["to"], fall["pairs"]) == (onset, 10 * len(falls), 20) and fall["both"] > 0.9


def test_less_than_three_standard_errors_are_no_fall() -> None:
    start = {pair: np.array([0.0, 0.0]) for pair in range(16)}
    for mean, onset in ((-0.770, None), (-0.780, 0)):  # changes of mean ± 1: a standard error of √(16/15)/4 = 0.258
        later = {pair: np.array([mean + (-1) ** pair, -9.0]) for pair in range(16)}
        fall = measured_fall([(0, start), (5, later)])
        assert (None if fall is None else fall["from"]) == onset
    assert fall is not None and fall["chosen_error"] == pytest.approx(np.sqrt(16 / 15) / 4) and fall["both"] == 0.5
    one = {0: np.array([0.0, 0.0])}
    assert measured_fall([(0, one), (5, {0: np.array([-9.0, -9.0])})]) is None
    assert measured_fall([(0, start)]) is None


def test_a_fixed_reference_is_the_start() -> None:
    columns = path([(0, 0), (-1, -1)])
    for side in ("chosen", "rejected"):  # the start lies 3 nats above the first checkpoint
        columns[f"ref_{side}_logp"] = [value + 3.0 for value in columns[f"{side}_logp"][:20]] * 2
    found = dynamics(columns, {})
    assert found is not None
    assert found["onset"]["measured"] == 0
    assert found["start"] == {
        f"{side}_logp": pytest.approx(np.mean(columns[f"{side}_logp"][:20]) + 3.0) for side in ("chosen", "rejected")
    }
    without = dynamics(columns | {"ref_chosen_logp": [None] * 40}, {})
    assert without is not None and without["start"] is None and without["onset"]["measured"] == 10


def test_a_checkpoint_at_step_0_is_the_start_whatever_the_reference() -> None:
    columns = path([(0, 0), (1, 1)])
    columns |= {"step": [0] * 20 + [20] * 20}
    for side in ("chosen", "rejected"):
        columns[f"ref_{side}_logp"] = [value + 9.0 for value in columns[f"{side}_logp"][:20]] * 2
    found = dynamics(columns, {})
    assert found is not None and found["start"] is not None
    assert found["onset"]["measured"] is None  # both rose since step 0, far below the reference as they are


def test_a_model_that_is_its_own_reference_says_nothing_of_the_start() -> None:
    columns = path([(0, 0), (-1, -1)])
    own = {f"ref_{side}_logp": columns[f"{side}_logp"] for side in ("chosen", "rejected")}
    assert dynamics(columns | own, {})["start"] is None  # type: ignore[index]
    first = columns | own | {"step": [0] * 20 + [20] * 20}
    assert dynamics(first, {})["start"] is None  # type: ignore[index]
    moving = {name: [value - at // 20 for at, value in enumerate(columns[name])] for name in own}
    assert dynamics(columns | moving, {})["start"] is None  # type: ignore[index]
    assert dynamics(columns, {})["start"] is not None  # type: ignore[index]


def curve(values: np.ndarray, every: int = 5) -> list[list[Any]]:
    return [[every * number, float(value)] for number, value in enumerate(values, 1)]


def test_one_checkpoint() -> None:
    columns = columns_of(*drawn(6, 0))
    assert dynamics(columns, {}) is None
    assert dynamics({name: [] for name in columns}, {}) is None
    assert dynamics(columns, {"loss": curve(np.zeros(40))}) is None
    fall = np.concatenate([np.zeros(20), -np.arange(1.0, 21.0)])
    found = dynamics(columns, {"logps/chosen": curve(fall), "logps/rejected": curve(fall)})
    assert found is not None
    assert (found["intervals"], found["whole"], found["cases_realised"]) == ([], None, None)
    assert found["onset"]["logged"] is not None


def test_one_pair() -> None:
    first = columns_of(*drawn(1, 0), step=1)
    found = dynamics(stacked(first, moved(first, 2, 0.1)), {})
    assert found is not None and has_no_nan(found)
    assert found["intervals"][0]["step_size"] == pytest.approx(0.1)
    assert found["onset"]["measured"] is None


def test_smoothing_is_a_running_median_with_whole_windows() -> None:
    values = np.array([5.0, 1.0, 2.0, 9.0, 3.0, 4.0, 8.0])
    truth = [np.median(values[min(max(at - 2, 0), 2) :][:5]) for at in range(7)]
    assert smooth(values, 5).tolist() == truth


def test_the_onset_of_a_clean_fall() -> None:
    drop = np.concatenate([np.full(30, -50.0), np.full(30, -60.0)])
    early = np.concatenate([np.full(10, -50.0), np.full(50, -60.0)])
    step, keys = logged_onset({"logps/chosen": curve(drop), "logps/rejected": curve(early)})
    assert keys == ["logps/chosen", "logps/rejected"]
    assert step == 5 * 30  # the later of the two
    assert logged_onset({"logps/chosen": curve(drop), "logps/rejected": curve(-drop)})[0] is None
    spike = np.full(60, -50.0)
    spike[[20, 40]] = -500.0
    assert logged_onset({"logps/chosen": curve(spike), "logps/rejected": curve(drop)})[0] is None
    back = np.concatenate([np.full(20, -50.0), np.full(20, -60.0), np.full(20, -50.0)])
    assert logged_onset({"logps/chosen": curve(back), "logps/rejected": curve(drop)})[0] is None


def test_the_onset_in_noise() -> None:
    draw = np.random.default_rng(0)
    at, falsely = [], 0
    for _ in range(300):
        shared = draw.normal(0, 10, 100)  # batches of long responses lower both
        flat = {
            f"logps/{side}": curve(-150 + shared + draw.normal(0, 5, 100), every=1) for side in ("chosen", "rejected")
        }
        falsely += logged_onset(flat)[0] is not None
        fall = -np.maximum(0.0, np.arange(100) - 40.0)
        falling = {
            key: [[step, value + float(fall[step - 1])] for step, value in points] for key, points in flat.items()
        }
        found = logged_onset(falling)[0]
        assert found is not None
        at.append(found)
    assert falsely / 300 < 0.02
    assert 42 < np.median(at) < 68


@pytest.mark.parametrize("points", [0, 1, FEWEST_POINTS - 1])
def test_few_points_say_nothing(points: int) -> None:
    fall = curve(-np.arange(float(points)))
    assert logged_onset({"logps/chosen": fall, "logps/rejected": fall}) == (None, [])
    assert logged_onset({}) == (None, [])
    assert logged_onset({"logps/chosen": curve(-np.arange(40.0))}) == (None, [])


def test_evaluation_curves_come_first_if_they_are_long_enough() -> None:
    fall, flat = np.concatenate([np.zeros(10), np.full(20, -5.0)]), np.zeros(30)
    curves = {f"logps/{side}": curve(flat) for side in ("chosen", "rejected")}
    curves |= {f"eval_logps/{side}": curve(fall) for side in ("chosen", "rejected")}
    assert logged_onset(curves) == (5 * 10, ["eval_logps/chosen", "eval_logps/rejected"])
    short = {f"eval_logps/{side}": curve(fall[8:12]) for side in ("chosen", "rejected")}
    assert logged_onset(curves | short) == (None, ["logps/chosen", "logps/rejected"])


def test_a_resumed_log_and_missing_values() -> None:
    fall = np.concatenate([np.zeros(15), np.full(15, -5.0)])
    points = curve(fall)
    curves = {f"logps/{side}": [[80, 999.0], *reversed(points), [75, None]] for side in ("chosen", "rejected")}
    assert logged_onset(curves)[0] == logged_onset(dict.fromkeys(curves, points))[0] == 75
