"""Files of checkpoints that are missing, cut off, pickled, sharded or hostile, each found without loading it."""

from __future__ import annotations

import builtins
import os
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from gradent.errors import ModelError
from gradent.loading.runs.discover import choose, find_run
from gradent.loading.weight_files import check_weights, kind_of
from tests.auditing.runs import TENSORS, make_full, make_run, problem, write_json

INDEX = "model.safetensors.index.json"


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def shard(run: Path, names: Any) -> Path:
    """Make the last checkpoint one of shards, as an index names them."""
    directory = run / "checkpoint-4"
    (directory / "model.safetensors").unlink()
    for number in (1, 2):
        save_file(TENSORS, directory / f"model-{number}.safetensors")
    write_json(directory / INDEX, {"weight_map": names})
    return directory


def test_a_truncated_file_of_weights(run) -> None:
    weights = run / "checkpoint-4" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes, and {len(whole)} by its own header" in problem(run)
    weights.write_bytes(whole + b"\0")
    assert f"has {len(whole) + 1} bytes, and {len(whole)} by its own header" in problem(run)
    for kept in (0, 7, 8, 20):
        weights.write_bytes(whole[:kept])
        assert f"is no whole safetensors file: it has {kept} bytes" in problem(run)
        assert "copy it again" in problem(run)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"3",
        b"\xff\xff",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": 3}}',
        b'{"a": {"data_offsets": [1]}}',
        b'{"a": {"data_offsets": [4, 0]}}',
        b'{"a": {"data_offsets": [-1, 4]}}',
        b'{"a": {"data_offsets": ["0", "4"]}}',
    ],
)
def test_a_broken_header_of_weights(header, run) -> None:
    (run / "checkpoint-4" / "model.safetensors").write_bytes(with_header(header, b"1234"))
    assert "model.safetensors: the header of this safetensors file cannot be read" in problem(run)


def test_a_header_without_end(run) -> None:
    with open(run / "checkpoint-4" / "model.safetensors", "wb") as handle:
        handle.write((2**31).to_bytes(8, "little"))
        handle.truncate(2**32)
    assert "is no whole safetensors file" in problem(run)


def test_weights_that_are_no_file(run) -> None:
    weights = run / "checkpoint-4" / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert "is not a regular file" in problem(run)


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("left", [True, False])
def test_weights_that_are_missing(kind, left, tmp_path, base) -> None:
    run = make_run(tmp_path / "run", base=base if kind == "adapter" else None)
    for path in (run / "checkpoint-4").iterdir():
        if not left or path.suffix == ".safetensors":
            path.unlink()
    (run / "checkpoint-4" / "optimizer.pt").touch()
    (run / "checkpoint-4" / "training_args.bin").touch()
    wanted = "adapter_model.safetensors" if kind == "adapter" and left else r"*.safetensors"
    assert f"checkpoint-4: no weights in it (no {wanted} file)" in problem(run)
    assert find_run(run).checkpoints[1].kind == (kind if left else None)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_pickled_weights(kind, tmp_path, base) -> None:
    run = make_run(tmp_path / "run", base=base if kind == "adapter" else None)
    (weights,) = (run / "checkpoint-4").glob("*.safetensors")
    name = "adapter_model.bin" if kind == "adapter" else "pytorch_model.bin"
    weights.rename(weights.with_name(name))
    for other in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (run / "checkpoint-4" / other).touch()
    said = problem(run)
    assert f"only pickled weights ({name}), which can run code" in said and "convert it once" in said
    assert ("PeftModel" if kind == "adapter" else "use_safetensors=False") in said


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_config_that_is_missing_or_broken(kind, tmp_path, base) -> None:
    run = make_run(tmp_path / "run", base=base if kind == "adapter" else None)
    config = run / "checkpoint-4" / ("config.json" if kind == "full" else "adapter_config.json")
    for content in ("{", "[]", ""):
        config.write_text(content)
        assert f"{config.name}: " in problem(run) and "copy it again" in problem(run)
    config.unlink()
    assert f"checkpoint-4: weights without {config.name}" in problem(run)
    config.mkdir()
    assert f"{config.name}: there is no such file" in problem(run)


def test_shards(run) -> None:
    directory = shard(run, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    assert find_run(run).checkpoints[1].problem is None
    second = directory / "model-2.safetensors"
    second.write_bytes(second.read_bytes()[:-4])
    assert "model-2.safetensors: has " in problem(run)
    second.unlink()
    assert f"1 of 2 files of weights that {INDEX} names are missing: 'model-2.safetensors'" in problem(run)
    (directory / "model-1.safetensors").unlink()
    assert f"2 of 2 files of weights that {INDEX} names are missing" in problem(run)


@pytest.mark.parametrize("names", [None, {}, [], {"a": 1}, "model-1.safetensors"])
def test_an_index_that_names_no_files(names, run) -> None:
    shard(run, names)
    assert f"{INDEX}: its weight_map does not name a file for each weight" in problem(run)


@pytest.mark.parametrize(
    "name",
    ["../checkpoint-2/model.safetensors", "/model.safetensors", "a/b.safetensors", "..\\b.safetensors", "..", "a.bin"]
    + ["\x1b[31m\n/<script>.safetensors", "/" + "x" * 9999],
)
def test_an_index_that_names_hostile_files(name, run) -> None:
    shard(run, {"a": "model-1.safetensors", "b": name})
    said = problem(run)
    assert "as a file of weights; accepted are the names of *.safetensors files that stand beside it" in said
    assert said.isprintable() and len(said) < 1000


@pytest.mark.parametrize("name", ["a\0b.safetensors", "x" * 9999 + ".safetensors", "\ud800.safetensors"])
def test_an_index_that_names_files_that_cannot_be(name, run) -> None:
    shard(run, {"b": name})
    assert "1 of 1 files of weights" in problem(run)
    assert problem(run).isprintable() and len(problem(run)) < 1000


@pytest.mark.parametrize(
    ("name", "directory", "said"),
    [
        ("pytorch_model_fsdp_0", True, "saved by FSDP as pytorch_model_fsdp_0.*accelerate merge-weights .*fsdp_0 .*-4"),
        ("pytorch_model_fsdp.bin", False, "saved by FSDP as pytorch_model_fsdp.bin.*weights_only=True"),
        ("global_step4", True, "saved by DeepSpeed as global_step4.*zero_to_fp32 .*--safe_serialization"),
    ],
)
def test_weights_that_only_training_can_read(name, directory, said, run) -> None:
    weights = run / "checkpoint-4" / "model.safetensors"
    (run / "checkpoint-4" / name).mkdir() if directory else (run / "checkpoint-4" / name).touch()
    assert find_run(run).checkpoints[1].problem is None  # beside whole weights they are the optimizer's
    weights.unlink()
    with pytest.raises(ModelError, match=said):
        choose(find_run(run), "4")


def test_links_that_lead_out_are_not_followed(run, tmp_path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(run / "checkpoint-4", outside)
    said = "is a link that leads out of the run's directory, and is not followed"
    for name in ("model.safetensors", "config.json", "trainer_state.json", "tokenizer.json"):
        path = run / "checkpoint-4" / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        path.symlink_to(outside / name)
        assert f"checkpoint-4: in it, '{name}' {said}" in problem(run) and "cp -rL" in problem(run)
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    templates = run / "checkpoint-4" / "additional_chat_templates"
    templates.mkdir()
    (templates / "a.jinja").symlink_to(outside / "config.json")
    assert f"'a.jinja' {said}" in problem(run)
    shutil.rmtree(templates)
    templates.symlink_to(outside)
    assert f"'additional_chat_templates' {said}" in problem(run)
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-4").symlink_to(outside)
    assert f"checkpoint-4: {said}" in problem(run)
    assert find_run(run).checkpoints[1].kind is None


def test_links_that_stay_inside_and_what_is_never_opened(run, tmp_path) -> None:
    (run / "weights").mkdir()
    (run / "checkpoint-4" / "model.safetensors").rename(run / "weights" / "w")
    (run / "checkpoint-4" / "model.safetensors").symlink_to("../weights/w")
    (run / "checkpoint-4" / "optimizer.pt").symlink_to(tmp_path / "elsewhere")
    (run / "checkpoint-4" / "global_step4").symlink_to(tmp_path)
    (run / "wandb").symlink_to(tmp_path)
    link = tmp_path / "latest"
    link.symlink_to(run)
    assert [each.problem for each in find_run(link).checkpoints] == [None, None]


def test_links_to_nothing_and_to_themselves(run) -> None:
    config = run / "checkpoint-4" / "config.json"
    config.unlink()
    config.symlink_to("gone.json")
    assert "weights without config.json" in problem(run)
    config.unlink()
    config.symlink_to("config.json")
    assert "weights without config.json" in problem(run)


def refusal(real: Any, ending: str) -> Any:
    """A function on paths that works, but for those with an ending: these may not be read."""

    def read(path: Any, *more: Any) -> Any:
        if str(path).endswith(ending):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more)

    return read


def test_a_checkpoint_that_cannot_be_read(run, monkeypatch) -> None:
    for name in ("listdir", "scandir"):  # one or the other is below pathlib
        monkeypatch.setattr(os, name, refusal(getattr(os, name), "checkpoint-4"))
    assert "checkpoint-4: cannot be read (Permission denied). Check its permissions" in problem(run)
    with pytest.raises(ModelError, match=r"checkpoint-4: cannot be read \(Permission denied\)"):
        kind_of(run / "checkpoint-4")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer_state.json"])
def test_a_file_that_cannot_be_read(name, run, monkeypatch) -> None:
    monkeypatch.setattr(builtins, "open", refusal(open, f"checkpoint-4/{name}"))
    assert f"checkpoint-4/{name}: cannot be read (Permission denied). Check its permissions" in problem(run)


def test_a_sound_file_of_weights_as_safetensors_writes_it(tmp_path) -> None:
    full = make_full(tmp_path / "full")
    for tensors in ({"empty": numpy.zeros(0, "float32")}, TENSORS):
        save_file(tensors, full / "model.safetensors", metadata={"format": "pt"})
        check_weights(full, "full")
