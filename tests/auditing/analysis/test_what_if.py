"""Other losses on the same gradients: against `verdict`, against plain loops, and what is said of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradent import losses
from gradent.auditing.analysis.columns import judge
from gradent.auditing.analysis.loss_grid import SWEEPS, label_loss
from gradent.auditing.analysis.recommendation import CLEARLY, find_foretold, recommend, standard_errors
from gradent.auditing.analysis.steps import SampleStep
from gradent.auditing.analysis.what_if import what_if
from gradent.losses import LOSSES
from gradent.record.table import Table
from gradent.report.page.numbers import share_of_pairs
from gradent.theory.conditions import Verdict, verdict
from tests.auditing.measured import columns_of, drawn, gram_of, has_no_nan, references_of, stacked

SEEDS = st.integers(0, 2**32 - 1)
KEYS = {
    "loss", "label", "group", "hyperparameters", "varied", "reason", "pairs", "cases", "ratio", "needs_at_least",
    "needs_at_most", "within", "share_chosen_rises", "share_rejected_falls", "ideal_by_step", "against_run", "sample",
}  # fmt: skip


def find(rows: list[dict[str, Any]], group: str, name: str | None = None, **hyper: Any) -> dict[str, Any]:
    return next(
        row
        for row in rows
        if row["group"] == group
        and name in {None, row["loss"]}
        and all(row["hyperparameters"].get(key) == value for key, value in hyper.items())
    )


def alike(pairs: int, chosen: float = 1.0, rejected: float = 3.0) -> dict[str, list[Any]]:
    """Pairs whose gradients are parallel, rejected the longer: DPO lowers both."""
    return columns_of(np.full((pairs, 1), chosen), np.full((pairs, 1), rejected))


def test_rows_and_their_groups() -> None:
    rows = what_if(columns_of(*drawn(30, 0)), losses.get("dpo", beta=0.3))
    assert all(set(row) == KEYS for row in rows)
    assert [row["group"] for row in rows[:11]] == ["run"] + ["paper"] * 10
    assert [row["loss"] for row in rows[1:11]] == list(LOSSES)
    assert [row["group"] for row in rows[11:-3]] == ["sweep"] * sum(len(settings) for _, _, settings in SWEEPS)
    assert [(row["group"], row["loss"]) for row in rows[-3:]] == [
        ("design", "pairwise_normalized"), ("design", "reward_calibration"), ("design", "token_masked"),
    ]  # fmt: skip
    assert {name for name, _, _ in SWEEPS} == set(LOSSES)
    assert all((row["varied"] is None) == (row["group"] != "sweep") for row in rows)
    assert all(row["varied"] in row["hyperparameters"] for row in rows if row["group"] == "sweep")
    assert has_no_nan(rows)


@settings(max_examples=10)  # here and below: a table of all losses takes a tenth of a second
@given(SEEDS)
def test_every_loss_agrees_with_the_verdict_and_a_plain_loop(seed: int) -> None:
    columns = columns_of(*drawn(40, seed, shared=0.8), seed=seed)
    rows = what_if(columns, losses.get("dpo"))
    for name in LOSSES:
        check_row(find(rows, "paper", name), name, columns)


def check_row(row: dict[str, Any], name: str, columns: dict[str, list[Any]]) -> None:
    judged = verdict(gram_of(columns), losses.get(name), *references_of(columns))
    assert row["cases"] == pytest.approx(judged.fractions())
    assert row["ideal_by_step"] == [[10, pytest.approx(judged.fractions()["ideal"])]]
    d_w, d_l = judged.d_w.tolist(), judged.d_l.tolist()
    active = [at for at in range(40) if d_w[at] or d_l[at]]
    positive = [at for at in active if d_w[at] > 0 and d_l[at] > 0]
    bound = [at for at in positive if columns["inner"][at] > 0]
    least = [columns["inner"][at] / columns["chosen_sq"][at] for at in bound]
    most = [columns["rejected_sq"][at] / columns["inner"][at] for at in bound]
    ratio = {at: d_w[at] / d_l[at] for at in positive}
    assume(0 < len(bound) < 40)
    assert row["ratio"] == pytest.approx(np.median(list(ratio.values())))
    assert row["needs_at_least"] == pytest.approx(np.median(least))
    assert row["needs_at_most"] == pytest.approx(np.median(most))
    inside = [low <= ratio[at] <= high for at, low, high in zip(bound, least, most, strict=True)]
    assert row["within"] == pytest.approx(np.mean(inside))
    assert row["share_chosen_rises"] == pytest.approx(np.mean([judged.chosen_change[at].item() >= 0 for at in active]))
    assert row["share_rejected_falls"] == pytest.approx(
        np.mean([judged.rejected_change[at].item() <= 0 for at in active])
    )


def test_a_case_that_can_be_reckoned_by_hand() -> None:
    # ‖g_w‖² = 1, ‖g_l‖² = 9, inner 3: DPO (ratio 1) lowers both; the ratio must be 3, exactly, for case 1.
    columns = alike(4)
    columns |= {"chosen_len": [10] * 4, "rejected_len": [30, 30, 30, 10]}
    rows = what_if(columns, losses.get("dpo"))
    dpo, simpo = find(rows, "run"), find(rows, "paper", "simpo")
    assert dpo["cases"] == {"ideal": 0.0, "both_down": 1.0, "both_up": 0.0, "reversed": 0.0, "inactive": 0.0}
    assert (dpo["ratio"], dpo["needs_at_least"], dpo["needs_at_most"], dpo["within"]) == (1.0, 3.0, 3.0, 0.0)
    assert simpo["ratio"] == pytest.approx(3.0)
    assert find(rows, "paper", "cpo")["cases"]["both_up"] == 1.0
    assert find(rows, "sweep", "cpo", lam=0.0)["cases"]["both_down"] == 1.0


def test_beta_does_not_change_the_ratio_of_dpo() -> None:
    rows = what_if(columns_of(*drawn(60, 3)), losses.get("dpo"))
    swept = [row for row in rows if row["group"] == "sweep" and row["loss"] == "dpo"]
    assert len(swept) == 5
    assert all(row["ratio"] == 1.0 and row["cases"] == rows[0]["cases"] for row in swept)


def test_the_sweep_of_the_runs_loss_keeps_its_other_hyperparameters() -> None:
    rows = what_if(columns_of(*drawn(10, 0)), losses.get("kto", lambda_w=2.0, beta=0.5))
    swept = [row["hyperparameters"] for row in rows if row["group"] == "sweep" and row["loss"] == "kto"]
    assert {(hyper["lambda_w"], hyper["beta"]) for hyper in swept} == {(2.0, 0.5)}
    assert [hyper["lambda_l"] for hyper in swept] == [0.5, 0.75, 1.0, 1.33, 2.0]


@settings(max_examples=10)
@given(SEEDS)
def test_pairwise_normalization_is_ideal_by_construction(seed: int) -> None:
    chosen, rejected = drawn(50, seed, shared=4.0, spread=1.5)
    row = find(what_if(columns_of(chosen, rejected), losses.get("dpo")), "design", "pairwise_normalized")
    assert row["cases"]["ideal"] == row["within"] == row["share_chosen_rises"] == row["share_rejected_falls"] == 1.0
    norms = [np.linalg.norm(each, axis=1) for each in (chosen, rejected)]
    assert row["ratio"] == pytest.approx(np.median(norms[1] / norms[0]))


@settings(max_examples=10)
@given(SEEDS, st.sampled_from(["dpo", "kto", "simpo"]))
def test_calibrated_rewards_have_the_middle_of_the_band_on_average(seed: int, name: str) -> None:
    chosen, rejected = drawn(50, seed, shared=2.0, spread=1.5)
    columns = columns_of(chosen, rejected)
    row = find(what_if(columns, losses.get(name)), "design", "reward_calibration")
    middle = float(np.exp(np.mean(np.log(np.linalg.norm(rejected, axis=1) / np.linalg.norm(chosen, axis=1)))))
    assert row["ratio"] == pytest.approx(middle)  # of every pair, whatever the loss's own
    own = verdict(gram_of(columns), losses.get(name), *references_of(columns))
    scale = (own.d_w * own.d_l).sqrt()  # α times and divided by: the product stays
    want = Verdict.from_weights(own.gram, scale * middle**0.5, scale / middle**0.5)
    assert row["cases"] == pytest.approx(want.fractions())


def test_nothing_to_calibrate_is_said() -> None:
    columns = columns_of(np.zeros((3, 2)), np.ones((3, 2)))
    row = find(what_if(columns, losses.get("dpo")), "design", "reward_calibration")
    assert row["cases"] is None and row["reason"] == "no pair has two gradients that the loss weighs."


def test_pairwise_normalization_at_a_cosine_of_one_and_a_rounding_beyond() -> None:
    draw = np.random.default_rng(0)
    chosen = draw.normal(size=(200, 7))
    columns = columns_of(chosen, chosen * draw.uniform(0.1, 9.0, (200, 1)))
    columns["inner"] = [inner * (1 + 1e-7) for inner in columns["inner"]]  # as float32 may leave it
    gram = gram_of(columns)
    naive = gram.chosen_sq / gram.chosen_sq.sqrt() - gram.inner / gram.rejected_sq.sqrt()
    assert (naive < 0).all()
    row = find(what_if(columns, losses.get("dpo")), "design", "pairwise_normalized")
    assert row["cases"]["ideal"] == row["share_chosen_rises"] == row["share_rejected_falls"] == 1.0


def test_zero_gradients_do_not_move_in_the_design() -> None:
    chosen, rejected = drawn(4, 1)
    chosen[0] = 0.0
    rejected[1] = 0.0
    chosen[2] = rejected[2] = 0.0
    columns = columns_of(chosen, rejected)
    assert columns["cosine"][:3] == [None] * 3
    rows = what_if(columns, losses.get("dpo"))
    row = find(rows, "design", "pairwise_normalized")
    # As in the trainer: the response without a gradient has weight 0 and stays, the other one goes its own way.
    assert row["cases"] == {"ideal": 0.75, "both_down": 0.0, "both_up": 0.0, "reversed": 0.0, "inactive": 0.25}
    assert has_no_nan(rows)
    assert recommend(rows)["design_ideal"] == 0.75  # type: ignore[index]


def test_without_a_reference_there_are_reasons_instead_of_numbers() -> None:
    columns = columns_of(*drawn(12, 2), reference=False)
    rows = what_if(columns, losses.get("dpo"))
    for row in rows:
        if row["loss"] == "token_masked":
            continue
        needs = row["loss"] in {"dpo", "rdpo", "ipo", "dpop", "kto", "reward_calibration"} or (
            row["loss"] == "sppo" and not row["hyperparameters"]["reference_free"]
        )
        assert (row["reason"] is not None) == (row["cases"] is None) == needs, row["label"]
        assert (row["ideal_by_step"][0][1] is None) == needs
        assert row["against_run"] is None
    found = recommend(rows)
    assert found is not None
    assert found["run_ideal"] is None and found["lever"] is None
    assert found["text"].startswith("DPO (β=0.1) cannot be judged on these pairs: it needs a reference's log-probs")


def test_a_callable_of_the_users_own() -> None:
    def hinge(chosen_logp: torch.Tensor, rejected_logp: torch.Tensor) -> torch.Tensor:
        return (2.0 * rejected_logp - chosen_logp + 1e3).relu().sum()

    columns = alike(5, chosen=2.0, rejected=1.0)
    row = what_if(columns, losses.from_callable(hinge))[0]
    assert (row["loss"], row["label"], row["hyperparameters"], row["ratio"]) == ("hinge", "hinge", {}, 0.5)
    assert row["cases"]["ideal"] == 1.0  # 0.5 is what ‖g_w‖ = 2, ‖g_l‖ = 1 and a cosine of 1 ask for

    def needs(chosen_logp: torch.Tensor, ref_chosen_logp: torch.Tensor) -> torch.Tensor:
        return -(chosen_logp - ref_chosen_logp).sum()

    without = what_if(columns_of(*drawn(3, 0), reference=False), losses.from_callable(needs))[0]
    assert without["cases"] is None and "reference" in without["reason"]
    assert what_if(columns_of(*drawn(3, 0)), losses.from_callable(needs))[0]["share_chosen_rises"] == 1.0

    broken = what_if(columns, losses.from_callable(lambda chosen_logp: (chosen_logp * math.nan).sum()))[0]
    assert broken["cases"] is None and "nan" in broken["reason"]


def test_all_inactive() -> None:
    columns = alike(3)
    columns |= {"chosen_logp": [-1.0] * 3, "rejected_logp": [-90.0] * 3}
    rows = what_if(columns, losses.get("slic", lam=0.0))
    assert rows[0]["cases"]["inactive"] == 1.0
    names = ("ratio", "needs_at_least", "needs_at_most", "within", "share_chosen_rises", "share_rejected_falls")
    assert [rows[0][name] for name in names] == [None] * 6
    assert "the loss moves nothing" in recommend(rows)["text"]  # type: ignore[index]
    assert has_no_nan(rows)


def test_a_ratio_beyond_float64_is_none() -> None:
    columns = columns_of(np.ones((2, 1)), np.ones((2, 1)))
    columns |= {"chosen_logp": [-1.0] * 2, "rejected_logp": [-7200.0] * 2}
    row = what_if(columns, losses.get("cpo", lam=1.0))[0]
    assert row["ratio"] is None and row["cases"]["both_up"] == 1.0


def test_the_last_step_counts_and_all_steps_are_shown() -> None:
    early, late = columns_of(*drawn(20, 0), step=5), columns_of(*drawn(8, 1, shared=3.0), step=20, seed=1)
    rows = what_if(stacked(late, early), losses.get("dpo"))
    shares = [
        verdict(gram_of(each), losses.get("dpo"), *references_of(each)).fractions()["ideal"] for each in (early, late)
    ]
    assert shares[0] != shares[1]
    assert rows[0]["ideal_by_step"] == [[5, shares[0]], [20, shares[1]]]
    assert rows[0]["pairs"] == 8
    alone = what_if(late, losses.get("dpo"))
    assert [{**row, "ideal_by_step": None} for row in rows] == [{**row, "ideal_by_step": None} for row in alone]


def test_one_pair_and_none() -> None:
    rows = what_if(columns_of(*drawn(1, 0)), losses.get("dpo"))
    assert has_no_nan(rows)
    found = recommend(rows)
    assert found is not None and "1 pair is too few to tell losses apart" in found["text"]
    assert found["lever"] == "too_few"
    assert found["best_clear"] is False  # one pair proves nothing
    assert what_if({name: [] for name in columns_of(*drawn(1, 0))}, losses.get("dpo")) == []
    assert recommend([]) is None


def test_gained_and_lost_are_counts_of_pairs() -> None:
    columns = columns_of(*drawn(80, 5, shared=0.7))
    rows = what_if(columns, losses.get("dpo"))
    ideal = {}
    for name in ("dpo", "simpo"):
        ideal[name] = verdict(gram_of(columns), losses.get(name), *references_of(columns)).case == 1
    against = find(rows, "paper", "simpo")["against_run"]
    assert against == {
        "gained": int((ideal["simpo"] & ~ideal["dpo"]).sum()),
        "lost": int((ideal["dpo"] & ~ideal["simpo"]).sum()),
    }
    assert against["lost"] > 0
    assert rows[0]["against_run"] == {"gained": 0, "lost": 0}


def test_labels() -> None:
    assert label_loss(losses.get("dpo")) == "DPO (β=0.1)"
    assert label_loss(losses.get("simpo")) == "SimPO (β=0.1, γ=0.5)"
    assert label_loss(losses.get("ipo", length_normalized=True)) == "IPO (β=0.1, length-normalized)"
    assert label_loss(losses.get("hinge")) == "hinge (β=0.1)"
    assert label_loss(losses.get("robust", beta=0.5, label_smoothing=0.1)) == "robust (β=0.5, label smoothing=0.1)"
    assert label_loss(losses.get("kto")) == "KTO (β=0.1, λ_w=1, λ_l=1, z=0)"


def biased(pairs: int) -> dict[str, list[Any]]:
    """Rejected responses three times as long, each token like the last: the set-up in which SimPO's ratio is right."""
    draw = np.random.default_rng(7)
    common = draw.normal(size=(pairs, 12))
    own = 0.5 * draw.normal(size=(2, *common.shape))
    columns = columns_of(10 * (common + own[0]), 30 * (common + own[1]))
    lengths = {"chosen_len": [10] * pairs, "rejected_len": [30] * pairs}
    return columns | lengths | {"chosen_logp": [-12.0] * pairs, "rejected_logp": [-35.0] * pairs}


def test_recommends_what_helps() -> None:
    found = recommend(what_if(biased(256), losses.get("dpo")))
    assert found is not None
    assert found["lever"] == "loss" and found["best_clear"] and found["best"].startswith("SimPO")
    assert found["run_ideal"] < 0.05 < 0.5 < found["best_ideal"]
    assert found["best_gained"] - found["best_lost"] == round(256 * (found["best_ideal"] - found["run_ideal"]))
    assert f"{found['best']} would make it {found['best_ideal']:.0%}" in found["text"]
    share = share_of_pairs(found["run_ideal"], 256)
    assert f"holds for {share} of 256 pairs" in found["text"] and "on 99% both fall" in found["text"]
    assert "100% by construction" in found["text"]
    assert "to first order and for one small step on each pair alone" in found["text"]
    assert has_no_nan(found)


def test_losses_that_raise_both_are_not_recommended() -> None:
    found = recommend(what_if(alike(64), losses.get("dpo")))
    assert found is not None
    assert [label.partition(" ")[0] for label in found["raises_both"]] == ["RRHF", "SLiC-HF", "CPO", "DPOP"]
    assert not found["best"].startswith(("CPO", "SLiC", "RRHF", "DPOP"))
    assert "raises chosen, but on 100% rejected with it" in found["text"]


def test_a_log_likelihood_term_with_more_pairs_in_case_1_is_still_not_the_answer() -> None:
    rows = what_if(columns_of(*drawn(100, 0)), losses.get("dpo"))
    for row in rows:
        if row["cases"] and row["group"] in {"run", "paper", "sweep"}:
            row["cases"] = {"ideal": 0.1, "both_down": 0.9, "both_up": 0.0, "reversed": 0.0, "inactive": 0.0}
            row["against_run"] = {"gained": 0, "lost": 0}
    cpo = find(rows, "paper", "cpo")
    cpo |= {"cases": {"ideal": 0.4, "both_down": 0.0, "both_up": 0.6, "reversed": 0.0, "inactive": 0.0}}
    cpo |= {"against_run": {"gained": 30, "lost": 0}}
    found = recommend(rows)
    assert found is not None and found["lever"] == "none" and found["raises_both"] == [cpo["label"]]
    cpo["cases"] |= {"ideal": 0.6, "both_up": 0.4}
    found = recommend(rows)
    assert found is not None and found["lever"] == "loss" and found["best"] == cpo["label"]
    assert "CPO (β=0.1, λ=1) would make it 60% (on 40% both rise)" in found["text"]


def test_more_than_noise_or_no_reason_to_change() -> None:
    rows = what_if(alike(200), losses.get("dpo"))
    for row in rows:  # nobody separates anything, but for two pairs of SimPO's
        if row["cases"] and row["group"] != "design":
            gained = 2 if row["loss"] == "simpo" else 0
            row["cases"] = {"ideal": gained / 200, "both_down": 1 - gained / 200, "both_up": 0, "reversed": 0}
            row["cases"]["inactive"] = 0.0
            row["against_run"] = {"gained": gained, "lost": 0}
    found = recommend(rows)
    assert found is not None
    assert found["lever"] == "none" and found["best"].startswith("SimPO") and found["best_clear"] is False
    assert "clearly better, so these pairs give no reason to change the loss" in found["text"]
    simpo = find(rows, "paper", "simpo")  # much better, on too few pairs to be sure
    cases = {**simpo["cases"], "ideal": 0.15, "both_down": 0.85}
    simpo.update(cases=cases, against_run={"gained": 70, "lost": 40})
    found = recommend(rows)
    assert found is not None and found["lever"] == "none" and not found["best_clear"]
    assert "no reason to change the loss" not in found["text"]
    assert "brings 70 of them into case 1 and takes 40 out of it. Measure more (max_pairs)" in found["text"]
    find(rows, "paper", "simpo").update(against_run={"gained": 20, "lost": 0})
    assert recommend(rows)["lever"] == "loss"  # type: ignore[index]


@pytest.mark.parametrize(("pairs", "ideal", "lever"), [(4, 4, "too_few"), (21, 21, "too_few"), (22, 22, "none_needed")])
def test_nearly_all_of_few_pairs_is_not_nearly_all(pairs: int, ideal: int, lever: str) -> None:
    assert lever_of(pairs, ideal) == lever


@pytest.mark.parametrize(("pairs", "ideal", "lever"), [(8, 4, "too_few"), (9, 0, "too_few"), (10, 0, "none")])
def test_so_few_pairs_that_no_loss_could_pass(pairs: int, ideal: int, lever: str) -> None:
    assert standard_errors(9, 0) < CLEARLY < standard_errors(10, 0)
    assert lever_of(pairs, ideal) == lever


def lever_of(pairs: int, ideal: int, foretold: dict[str, Any] | None = None) -> str:
    """The lever where every loss leaves as many pairs in case 1 as the run's does."""
    rows = what_if(columns_of(*drawn(pairs, 0)), losses.get("dpo"))
    share = ideal / pairs
    for row in rows:
        if row["cases"] and row["group"] != "design":
            row["cases"] = {"ideal": share, "both_down": 1 - share, "both_up": 0.0, "reversed": 0.0, "inactive": 0.0}
            row["against_run"] = {"gained": 0, "lost": 0}
    found = recommend(rows, foretold)
    assert found is not None
    if found["lever"] == "too_few":
        assert f"{pairs} pairs are too few to tell losses apart: measure 100 or more" in found["text"]
    return found["lever"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "lever"), [(0.36, 0.81, "not_foretold"), (0.55, 0.9, "not_foretold"), (0.7, 0.8, "none")]
)
def test_no_loss_is_proposed_from_steps_that_foretold_nothing(chosen: float, rejected: float, lever: str) -> None:
    intervals = [{"from": 5, "to": 10, "pairs": 160, "chosen_sign": 0.9, "rejected_sign": 0.9}]
    intervals.append({"from": 10, "to": 60, "pairs": 160, "chosen_sign": chosen, "rejected_sign": rejected})
    foretold = find_foretold(None, {"intervals": intervals}, is_sample=False)
    assert foretold == {"from": 10, "to": 60, "pairs": 160, "chosen": chosen, "rejected": rejected}
    assert lever_of(160, 80, foretold) == lever
    assert find_foretold(None, None, is_sample=True) is None
    assert find_foretold({"intervals": []}, {"intervals": intervals}, is_sample=True) is None


def test_an_ideal_run_is_left_alone() -> None:
    columns = columns_of(*drawn(100, 0, shared=0.0, spread=0.0))
    found = recommend(what_if(columns, losses.get("dpo")))
    assert found is not None
    assert found["run_ideal"] >= 0.95 and found["lever"] == "none_needed"
    assert "little to add" in found["text"]


def test_a_hyperparameter_of_the_runs_own_loss() -> None:
    # Parallel gradients with ‖g_l‖ = 1.01‖g_w‖ and a cosine short of 1: CPO's ratio must be just above 1.
    draw = np.random.default_rng(2)
    chosen = draw.normal(size=(128, 12))
    columns = columns_of(chosen, 1.1 * (chosen + 0.3 * draw.normal(size=chosen.shape)))
    columns |= {"chosen_logp": [-30.0] * 128, "rejected_logp": [-29.0] * 128, "chosen_len": [10] * 128}
    columns |= {"rejected_len": [5] * 128}
    found = recommend(what_if(columns, losses.get("cpo")))
    assert found is not None
    assert found["own_clear"] and found["own"] in {"CPO (β=0.1, λ=0.01)", "CPO (β=0.1, λ=0)"}
    assert "Within CPO, λ=0" in found["text"]


@settings(max_examples=20)
@given(st.sampled_from(list(LOSSES)), SEEDS, st.integers(1, 90), st.floats(0, 4))
def test_what_is_said_is_what_the_rows_hold(name: str, seed: int, pairs: int, shared: float) -> None:
    columns = columns_of(*drawn(pairs, seed, shared=shared), seed=seed)
    rows = what_if(columns, losses.get(name))
    found = recommend(rows)
    assert found is not None and has_no_nan(found)
    assert 1 <= found["text"].count(". ") + 1 <= 3 and found["text"].endswith(".")
    paper = [row for row in rows if row["group"] == "paper" and row["loss"] != name]
    terms = {"rrhf", "slic", "cpo", "dpop"}
    allowed = [row for row in paper if row["loss"] not in terms or row["cases"]["both_up"] <= row["cases"]["ideal"]]
    assert found["best_ideal"] == max((row["cases"]["ideal"] for row in allowed), default=None)
    if found["lever"] == "loss":
        assert found["best_ideal"] > found["run_ideal"] and found["best"] in found["text"]
    assert found["design_ideal"] == 1.0


def test_standard_errors_are_mcnemars() -> None:
    assert standard_errors(gained=16, lost=0) == 15 / 4
    assert standard_errors(gained=5, lost=5) == 0.0
    assert standard_errors(gained=3, lost=9) == 0.0
    draw = np.random.default_rng(0)
    # Two losses that are equally good: the threshold is passed about once in four hundred samples (one side).
    heads = draw.binomial(40, 0.5, 20_000)
    passed = np.mean([standard_errors(gained=int(each), lost=40 - int(each)) > CLEARLY for each in heads])
    assert 0.0005 < passed < 0.005


def stepped(chosen: Any, rejected: Any) -> SampleStep:
    """A step on a sample whose rows' gradients are these vectors."""
    vectors = np.stack([np.asarray(chosen), np.asarray(rejected)])
    squares, inner = np.square(vectors).sum(2), (vectors[0] * vectors[1]).sum(1)
    return SampleStep(vectors=vectors, squares=squares, inner=inner, is_exact=True)


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_with_the_term_a_step_lowers_no_unseen_chosen_on_average(name: str) -> None:
    chosen, rejected = (vectors + common for vectors, common in zip(drawn(20, 5), (1.0, 2.0), strict=True))
    columns, loss = columns_of(chosen, rejected), losses.get(name)
    term = find(what_if(columns, loss, sample=stepped(chosen, rejected)), "term", "nll_term")
    weight = term["hyperparameters"]["nll_weight"]
    assert weight > 0
    table = Table.read(columns)
    judged = judge(table, loss)
    d_w = judged.d_w.numpy() + weight / table["chosen_len"].mean()
    unseen = []
    for pair in range(20):
        others = [other for other in range(20) if other != pair]
        step = d_w[others] @ chosen[others] - judged.d_l.numpy()[others] @ rejected[others]
        unseen.append(float(chosen[pair] @ step))
    assert abs(np.mean(unseen)) <= 1e-10 * np.abs(unseen).max()
    assert term["label"].endswith(f"+ {weight:.2g} · NLL of chosen")
    assert term["sample"]["cases"]


def test_where_chosen_does_not_fall_no_term_is_needed() -> None:
    chosen, rejected = (np.abs(vectors) for vectors in drawn(20, 5))
    rows = what_if(columns_of(chosen, -rejected), losses.get("dpo"), sample=stepped(chosen, -rejected))
    assert not [row for row in rows if row["group"] == "term"]


def test_the_term_is_recommended_where_steps_foretold_the_run() -> None:
    chosen, rejected = (vectors + common for vectors, common in zip(drawn(160, 5), (1.0, 2.0), strict=True))
    rows = what_if(columns_of(chosen, rejected), losses.get("dpo"), sample=stepped(chosen, rejected))
    weight = find(rows, "term", "nll_term")["hyperparameters"]["nll_weight"]
    foretold = {"from": 10, "to": 60, "pairs": 160, "chosen": 0.9, "rejected": 0.9}
    said, silent = recommend(rows, foretold), recommend(rows)
    assert said is not None and silent is not None
    assert said["nll_weight"] == silent["nll_weight"] == weight
    assert f"A likelihood term on chosen of weight {weight:.2g} (in TRL loss_type=[..., 'sft']" in said["text"]
    assert "likelihood term on chosen of weight" not in silent["text"]
    nothing = recommend(rows, foretold | {"chosen": 0.5, "rejected": 0.5})
    assert nothing is not None and "likelihood term on chosen of weight" not in nothing["text"]
