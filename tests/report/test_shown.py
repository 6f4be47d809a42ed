"""Which scalars trackers are given, and under which names."""

from __future__ import annotations

import json

import pytest

from gradent.report.live.shown import ShownScalars, TrackerKey, with_totals

QUIET = {
    "gradent/inactive": 0.0, "gradent/group/without_contrast": 0.0, "gradent/coverage": 1.0,
    "gradent/weight_ratio": 1.0, "gradent/case/reversed": 0.0, "gradent/sketch_error": 0.01,
}  # fmt: skip


def test_a_key_keeps_its_section() -> None:
    """transformers puts `train/` in front of every key; a plain string is what comes out, whatever comes first."""
    key = TrackerKey("gradent/cosine")
    assert key == "gradent/cosine" and hash(key) == hash("gradent/cosine") and {key: 1}["gradent/cosine"] == 1
    for prefix, whole in (("train/", "gradent/cosine"), ("eval/", "eval/gradent/cosine"), ("", "gradent/cosine")):
        assert prefix + key == whole and type(prefix + key) is str
    assert key + "/x" == "gradent/cosine/x" and json.loads(json.dumps({key: 1.0})) == {"gradent/cosine": 1.0}


def test_transformers_puts_it_in_no_section_of_its_own() -> None:
    integrations = pytest.importorskip("transformers.integrations.integration_utils")
    logs = {TrackerKey("gradent/cosine"): 0.5, "loss": 1.0, "eval_loss": 2.0}
    assert integrations.rewrite_logs(logs) == {"gradent/cosine": 0.5, "train/loss": 1.0, "eval/loss": 2.0}


def test_constants_are_shown_once_they_say_something() -> None:
    shown = ShownScalars(detail=False)
    assert shown.choose({**QUIET, "gradent/cosine": 0.5}, has_figures=True) == {"gradent/cosine": 0.5}
    loud = {
        "gradent/inactive": 0.1, "gradent/group/without_contrast": 0.1, "gradent/coverage": 0.9,
        "gradent/weight_ratio": 1.2, "gradent/case/reversed": 0.01, "gradent/sketch_error": 0.03,
    }  # fmt: skip
    for name, value in loud.items():
        shown = ShownScalars(detail=False)
        assert shown.choose(QUIET | {name: value}, has_figures=True) == {name: value}
        assert shown.choose(QUIET, has_figures=True) == {name: QUIET[name]}, "and from there on"
    assert ShownScalars(detail=True).choose(QUIET, has_figures=True) == QUIET


def test_what_was_asked_for_is_shown() -> None:
    asked = {"gradent/layer/h.0/cosine": 0.1, "gradent/explained": 0.9, "gradent/probe/chosen_logp": -3.0}
    assert ShownScalars(detail=False).choose(asked, has_figures=True) == asked


def test_totals() -> None:
    moved = {"own": 1.0, "partner": -2.0, "others_chosen": 0.5, "others_rejected": -0.25, "momentum": 4.0}
    scalars = {f"gradent/moved/chosen/{name}": value for name, value in moved.items()}
    added = {"gradent/moved/chosen/others": 0.25, "gradent/moved/chosen/total": 3.25}
    assert with_totals(scalars) == scalars | added
    whole = {"gradent/moved/rejected/step": -1.0}
    assert with_totals(whole) == whole | {"gradent/moved/rejected/total": -1.0}
    assert with_totals({"gradent/cosine": 0.5}) == {"gradent/cosine": 0.5}
