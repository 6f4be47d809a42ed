"""What trainers logged: real logs of TRL and of gradent's callback, and logs that are broken or odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradent import EntanglementCallback
from gradent.errors import DataFileError
from gradent.loading.runs.discover import find_run
from gradent.loading.runs.trainer_log import read_history
from tests.auditing.trained import Trained, train_run

TRL = {"loss", "learning_rate", "logps/chosen", "logps/rejected"} | {
    f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Trained:
    """A run that was taken up again from its first checkpoint."""
    directory = tmp_path_factory.mktemp("resumed")
    train_run(directory, lora=True, steps=4, save_steps=2, callbacks=[EntanglementCallback(every=2)])
    return train_run(
        directory,
        lora=True,
        steps=6,
        save_steps=2,
        resume=2,
        save_model=True,
        callbacks=[EntanglementCallback(every=2)],
    )


def write_log(path: Path, log: Any) -> Path:
    path.write_text(json.dumps({"global_step": 9, "log_history": log}))
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trainer_state.json"


def test_a_run_of_trl_with_gradents_callback(resumed) -> None:
    history = find_run(resumed.run).history
    assert history == resumed.run / "trainer_state.json"
    read = read_history(history)
    assert (read.source, read.problems) == ("trainer_state.json", [])
    assert {key for key in read.curves if not key.startswith(("eval_", "gradent/"))} == TRL
    assert {key for key in read.curves if key.startswith("eval_")} == {f"eval_{key}" for key in TRL - {"learning_rate"}}
    for key in TRL:
        assert [step for step, _ in read.curves[key]] == [1, 2, 3, 4, 5, 6], key
    assert [step for step, _ in read.curves["eval_loss"]] == [2, 4, 6]
    assert {"gradent/cosine", "gradent/coverage"} <= set(read.curves)
    assert read.curves["loss"][0][1] == pytest.approx(0.6931, abs=1e-3)
    margins = dict(read.curves["rewards/margins"])
    parts = dict(read.curves["rewards/chosen"]), dict(read.curves["rewards/rejected"])
    assert all(margins[step] == pytest.approx(parts[0][step] - parts[1][step], abs=1e-6) for step in margins)


def test_a_checkpoints_log_ends_with_it(resumed) -> None:
    read = read_history(resumed.run / "checkpoint-4" / "trainer_state.json")
    assert read.source == "checkpoint-4/trainer_state.json"
    assert [step for step, _ in read.curves["loss"]] == [1, 2, 3, 4]


def test_what_is_kept(path) -> None:
    kept = ["loss", "eval_loss", "eval_helpful_logps/chosen", "gradent/case/<script>\n", "learning_rate"]
    left = ["epoch", "train_loss", "grad_norm", "logits/chosen", "eval_runtime", "xloss", "eval_xloss", "total_flos"]
    read = read_history(write_log(path, [{"step": 1, **dict.fromkeys(kept + left, 0.5)}]))
    assert read.curves == {key: [(1, 0.5)] for key in sorted(kept)}
    assert read.problems == []


def test_the_later_entry_of_a_step_holds_and_steps_are_sorted(path) -> None:
    log = [(3, 1.0), (1, 2.0), (3, 4), (2, 5.0), (1, float("nan"))]
    read = read_history(write_log(path, [{"step": step, "loss": value} for step, value in log]))
    assert read.curves == {"loss": [(2, 5.0), (3, 4.0)]}
    assert isinstance(read.curves["loss"][1][1], float)
    assert read.problems == [f"{path}: 1 values are left out of the curves. 1 times: 'loss' is no finite number."]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "NaN", "1.0", None, True, [1.0], {}, 10**400])
def test_values_that_are_no_finite_numbers(value, path) -> None:
    read = read_history(write_log(path, [{"step": 1, "loss": value, "eval_loss": 1.0}, {"step": 2, "loss": value}]))
    assert read.curves == {"eval_loss": [(1, 1.0)]}
    (problem,) = read.problems
    assert problem == f"{path}: 2 values are left out of the curves. 2 times: 'loss' is no finite number."


def test_entries_that_cannot_be_read(path) -> None:
    odd = [3, None, [], {}, {"step": "2", "loss": 1.0}, {"step": -1}, {"step": True}, {"step": 2.5}, {"step": 10**18}]
    read = read_history(write_log(path, [*odd, {"step": 1, "loss": 1.0}]))
    assert read.curves == {"loss": [(1, 1.0)]}
    (problem,) = read.problems
    assert "9 values are left out" in problem
    assert "6 times: entry whose step is no whole number" in problem and "3 times: entry that is no object" in problem


def test_hostile_keys_are_escaped_and_bounded(path) -> None:
    keys = ["gradent/\x1b[31m\n<script>", *(f"gradent/{number}" + "x" * 9999 for number in range(9))]
    read = read_history(write_log(path, [{"step": 1, "loss": 1.0, **dict.fromkeys(keys, "odd")}]))
    assert read.curves == {"loss": [(1, 1.0)]}
    assert read.problems[0].isprintable() and "and 5 more" in read.problems[0] and len(read.problems[0]) < 1500


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "has no log_history"),
        ({"log_history": None}, "has no log_history"),
        ({"log_history": "x"}, "is a str, not"),
    ],
)
def test_without_a_log(content, said, path) -> None:
    path.write_text(json.dumps(content))
    read = read_history(str(path))
    assert read.curves == {}
    (problem,) = read.problems
    assert problem.startswith(f"{path}: ") and said in problem and "no curves of the trainer" in problem


@pytest.mark.parametrize("log", [[], [{"step": 1, "epoch": 1.0}]])
def test_a_log_without_curves(log, path) -> None:
    read = read_history(write_log(path, log))
    assert read.curves == {}
    assert f"none of its {len(log)} log entries holds a loss" in read.problems[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_broken_file(content, path) -> None:
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=r"trainer_state.json: .*copy it again"):
        read_history(path)


def test_a_file_that_is_not_there_or_too_large(path) -> None:
    with pytest.raises(DataFileError, match=r"trainer_state.json: there is no such file. Copy it again"):
        read_history(path)
    with open(path, "wb") as handle:
        handle.truncate(2**28 + 1)
    with pytest.raises(DataFileError, match=r"268435457 bytes, which is no sound size.*Remove it"):
        read_history(path)
