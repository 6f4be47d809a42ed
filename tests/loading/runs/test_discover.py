"""The checkpoints of runs: real ones of TRL, and every way in which one can be broken, mixed or hostile."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from gradent.errors import InputError, ModelError
from gradent.loading.models import load_model
from gradent.loading.runs.checkpoint import Checkpoint
from gradent.loading.runs.discover import choose, find_run, is_run
from gradent.loading.source import resolve_source
from tests.auditing.runs import TENSORS, make_adapter, make_run, problem, write_json, write_state
from tests.auditing.trained import Trained, train_run


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Trained:
    return train_run(tmp_path_factory.mktemp("full"), lora=False, steps=4, save_steps=2)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Trained:
    return train_run(tmp_path_factory.mktemp("lora"), lora=True, steps=4, save_steps=2, save_model=True)


# Real runs


def test_a_full_run_of_trl(full_run) -> None:
    found = find_run(full_run.run)
    assert (found.directory, found.kind, found.base, found.start) == (full_run.run, "full", None, None)
    assert found.checkpoints == [
        Checkpoint(step=step, path=str(full_run.run / name), name=name, kind="full")
        for step, name in [(2, "checkpoint-2"), (4, "checkpoint-4")]
    ]
    assert found.history == full_run.run / "checkpoint-4" / "trainer_state.json"
    (note,) = found.notes
    assert "step 0) is left out: its model card names no base_model" in note and "--base DIR" in note
    load_model(resolve_source(choose(found, "last")[0].path))


def test_a_full_run_of_trl_from_its_base(full_run) -> None:
    found = find_run(full_run.run, base=str(full_run.base))
    assert found.notes == []
    first = Checkpoint(step=0, path=str(full_run.base), name="base", kind="full")
    assert found.start == first and first not in found.checkpoints
    assert [each.step for each in choose(found, "all")] == [0, 2, 4]
    assert choose(found, "0") == [first]
    assert [each.step for each in choose(found, "last")] == [4]


def test_adapters_of_trl(lora_run) -> None:
    found = find_run(lora_run.run)
    assert (found.kind, found.base, found.start) == ("adapter", str(lora_run.base), None)
    assert [(each.step, each.name, each.kind, each.problem) for each in found.checkpoints] == [
        (2, "checkpoint-2", "adapter", None),
        (4, "checkpoint-4", "adapter", None),
    ]
    assert found.history == lora_run.run / "trainer_state.json"  # longer by the line at the end of training
    (note,) = found.notes
    assert "left aside: its trainer_state.json says step 4, and checkpoint-4 is of step 4" in note
    source = resolve_source(choose(found, [2])[0].path)
    assert source.base == found.base
    load_model(source)


def test_no_pickle_of_a_run_is_opened_and_torch_is_not_imported(lora_run, tmp_path) -> None:
    run = shutil.copytree(lora_run.run, tmp_path / "run")
    pickles = [path for path in run.rglob("*") if path.suffix in {".bin", ".pt", ".pth"}]
    assert len(pickles) >= 8
    script = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "from gradent.loading.runs.discover import choose, find_run\n"
        "choose(find_run(sys.argv[1]), 'all')\n"
        "assert any(name.endswith('adapter_model.safetensors') for name in opened)\n"
        "assert not [name for name in opened if name.endswith(('.bin', '.pt', '.pth'))]\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(run)], check=True)


# Which there are


def test_what_is_a_run(run, tmp_path) -> None:
    assert is_run(run) and is_run(str(run))
    assert not is_run(run / "checkpoint-2")
    assert not is_run(run / "checkpoint-2" / "config.json")
    assert not is_run("owner/name") and not is_run("") and not is_run("a\0b") and not is_run("a" * 5000)
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-٣", "checkpoint-2\n", "a-checkpoint-2"):
        (tmp_path / "other" / name).mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-3").touch()
    assert not is_run(tmp_path / "other")


@pytest.mark.parametrize("name", ["gone", "base"])
def test_what_is_no_run(name, base, tmp_path) -> None:
    with pytest.raises(InputError, match=rf"{name}: not a run. A run is a directory that holds checkpoint-<step>"):
        find_run(tmp_path / name)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path) -> None:
    run = make_run(tmp_path / "run", steps=(1000, 9, 200))
    assert [each.step for each in find_run(run).checkpoints] == [9, 200, 1000]


def test_what_only_looks_like_a_checkpoint_is_noted(run) -> None:
    for name in ("tmp-checkpoint-6", "checkpoint-6.tmp", "checkpoint-\x1b[31m\n<script>", "logs"):
        (run / name).mkdir()
    (run / "checkpoint-9").touch()
    found = find_run(run)
    assert [each.step for each in found.checkpoints] == [2, 4]
    said = "\n".join(found.notes)
    assert "\x1b" not in said
    for name in ("'tmp-checkpoint-6'", "'checkpoint-6.tmp'", r"'checkpoint-\x1b[31m\n<script>'"):
        assert f"{name} is left aside: an unfinished save" in said
    assert "'checkpoint-9' is left aside: not a directory" in said and "logs" not in said


def test_a_step_that_is_there_twice(run) -> None:
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-04")
    assert [(each.name, each.problem is None) for each in find_run(run).checkpoints[1:]] == [
        ("checkpoint-04", True),
        ("checkpoint-4", False),
    ]
    assert "another checkpoint has step 4 as well" in str(find_run(run).checkpoints[2].problem)


def test_full_models_and_adapters_are_not_one_run(run, base) -> None:
    make_adapter(run / "checkpoint-6", str(base))
    said = [each.problem for each in find_run(run).checkpoints]
    assert said[2] is None
    assert all("is a full model, and the run's last checkpoint is an adapter" in str(each) for each in said[:2])


# The model in the run's own directory


def add_root(run: Path, step: int | None, **more: Any) -> Path:
    write_json(run / "config.json", {"model_type": "llama"})
    save_file(TENSORS, run / "model.safetensors")
    (run / "training_args.bin").write_bytes(b"never read")
    if step is not None:
        write_state(run, step, **more)
    return run


@pytest.mark.parametrize(
    ("step", "more", "why"),
    [
        (None, {}, "no readable trainer_state.json stands beside it, so its step is not known"),
        (4, {}, "says step 4, and checkpoint-4 is of step 4"),
        (3, {}, "says step 3, and checkpoint-4 is of step 4"),
        (5, {"best_model_checkpoint": "checkpoint-2"}, "the run kept the best of its checkpoints"),
        ("5", {}, "no readable trainer_state.json"),
    ],
)
def test_the_runs_own_model_is_left_aside(step, more, why, run) -> None:
    found = find_run(add_root(run, step, **more), base="owner/name")
    assert [each.step for each in found.checkpoints] == [2, 4]
    assert f"the model in the run's own directory is left aside: {why}" in found.notes[-1].replace(
        "its trainer_state.json says", "says"
    )


def test_the_runs_own_model_is_the_last(run) -> None:
    found = find_run(add_root(run, 5, lines=9), base="owner/name")
    assert found.checkpoints[-1] == Checkpoint(step=5, path=str(run), name="run", kind="full")
    assert found.notes == [] and found.history == run / "trainer_state.json"
    (run / "model.safetensors").write_bytes(b"")
    assert "is no whole safetensors file" in problem(run, 5)


def test_the_runs_own_model_is_called_by_the_runs_name(run, monkeypatch) -> None:
    add_root(run, 5)
    monkeypatch.chdir(run)
    assert find_run(".").checkpoints[-1].name == "run"


def test_a_merged_model_beside_its_adapters(adapters) -> None:
    found = find_run(add_root(adapters, 5))
    assert [each.step for each in found.checkpoints] == [2, 4]
    assert "left aside: it is a full model, and the run's checkpoints are adapters" in found.notes[0]


def test_the_history_is_the_longest_log(run) -> None:
    assert find_run(run).history == run / "checkpoint-4" / "trainer_state.json"
    write_state(run, 4, lines=4)
    assert find_run(run).history == run / "trainer_state.json"
    write_state(run, 4, lines=3)
    assert find_run(run).history == run / "checkpoint-4" / "trainer_state.json"
    write_json(run / "checkpoint-4" / "trainer_state.json", {"global_step": 4})
    assert find_run(run).history == run / "trainer_state.json"


# Choosing


@pytest.mark.parametrize("spec", ["2,4", " 4 , 2 ", [4, 2, 2], (2, 4), "all", " all "])
def test_choosing(spec, run) -> None:
    assert [each.step for each in choose(find_run(run), spec)] == [2, 4]


@pytest.mark.parametrize("spec", ["", "first", "2,", "2;4", "-2", "2.0", "٣", [], [2.0], [True], [-2], ["x"], "9" * 99])
def test_what_cannot_be_chosen(spec, run) -> None:
    with pytest.raises(InputError, match=r"checkpoints is .*accepted: all, last, or steps such as 0,200,400"):
        choose(find_run(run), spec)


def test_a_step_that_is_not_there(run) -> None:
    with pytest.raises(InputError, match=r"run: has no checkpoint of step 3, 5\. It has 2, 4\."):
        choose(find_run(run), "2,3,5")


def test_step_0_of_a_full_run_whose_base_is_not_known(run) -> None:
    with pytest.raises(InputError, match=r"step 0, the model before training, is not known. Pass --base DIR"):
        choose(find_run(run), "0")


def test_step_0_of_adapters(adapters, base) -> None:
    found = find_run(adapters, base=str(base))
    assert [each.step for each in choose(found, "all")] == [2, 4]
    with pytest.raises(InputError, match=r"the first, random adapter that training started from was not saved"):
        choose(found, "0,2")


def test_step_0_that_was_saved(tmp_path, base) -> None:
    full = find_run(make_run(tmp_path / "full", steps=(0, 2)), base=str(base))
    assert full.start is None and [each.name for each in choose(full, "0")] == ["checkpoint-0"]
    adapters = find_run(make_run(tmp_path / "adapters", steps=(0, 2), base=base))
    assert [each.name for each in choose(adapters, "0")] == ["checkpoint-0"]


def test_the_last_is_the_last_that_can_be_measured_and_what_is_broken_after_it_is_told(tmp_path) -> None:
    run = make_run(tmp_path / "run", steps=(2, 4, 6))
    (run / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    chosen = choose(find_run(run), "last")
    assert [(each.step, each.problem is None) for each in chosen] == [(4, True), (6, False)]
    assert [each.step for each in choose(find_run(run), "2,6")] == [2, 6]


@pytest.mark.parametrize("spec", ["all", "last", "4"])
def test_nothing_that_can_be_measured(spec, run) -> None:
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"(?s)none of the checkpoints that are asked for.*checkpoint-4: no weights"):
        choose(find_run(run), spec)
