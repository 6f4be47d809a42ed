"""The trainer's state beside a checkpoint: which step it says, and states that are broken, too large or elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradent.loading.runs.discover import find_run
from tests.auditing.runs import make_run, problem, write_state


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


def test_the_name_and_the_state_disagree(run) -> None:
    write_state(run / "checkpoint-4", 40)
    said = problem(run)
    assert "its trainer_state.json says step 40, and its name says step 4" in said
    assert "Give it the name of its step, checkpoint-40" in said


def test_without_a_state_the_name_tells_the_step(run) -> None:
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "trainer_state.json").unlink()
    found = find_run(run)
    assert [(each.step, each.problem) for each in found.checkpoints] == [(2, None), (4, None)]
    assert found.history is None
    assert "no checkpoint has a readable trainer_state.json" in found.notes[0]


@pytest.mark.parametrize("step", [None, "4", 4.0, True, -1, 10**30])
def test_a_state_without_a_step(step, run) -> None:
    write_state(run / "checkpoint-4", step)
    assert "a whole number is expected. Correct it, or remove the file" in problem(run)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe\xfd", b"[" * 100_000, b'{"global_step": ' + b"9" * 9999]
)
def test_a_broken_state(content, run) -> None:
    (run / "checkpoint-4" / "trainer_state.json").write_bytes(content)
    said = problem(run)
    assert "checkpoint-4/trainer_state.json: " in said and "copy it again" in said and len(said) < 1000


def test_a_state_without_end(run) -> None:
    with open(run / "checkpoint-4" / "trainer_state.json", "wb") as handle:
        handle.truncate(2**30)
    assert "1073741824 bytes, which is no sound size for this file: up to 268435456 (256 MiB)" in problem(run)


def test_links_of_the_runs_own_files(run, tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "README.md").write_text("---\nbase_model: owner/name\n---\n")
    write_state(outside, 9, lines=99)
    for name in ("README.md", "trainer_state.json"):
        (run / name).symlink_to(outside / name)
    found = find_run(run)
    assert found.base is None and found.history == run / "checkpoint-4" / "trainer_state.json"
    assert "is not followed. Remove it" in found.notes[0]
    assert "its README.md is a link that leads out of the run's directory" in found.notes[1]
