"""Runs made by hand: directories with the files of checkpoints, small and without a model in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save_file

from gradent.loading.runs.discover import find_run

TENSORS = {"a": numpy.ones((2, 3), "float32"), "b": numpy.zeros(4, "float32")}


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def make_full(path: Path) -> Path:
    path.mkdir(parents=True)
    write_json(path / "config.json", {"model_type": "llama"})
    save_file(TENSORS, path / "model.safetensors")
    return path


def make_adapter(path: Path, base: str | None) -> Path:
    path.mkdir(parents=True)
    write_json(path / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": base})
    save_file(TENSORS, path / "adapter_model.safetensors")
    return path


def write_state(path: Path, step: Any, lines: int = 1, **more: Any) -> Path:
    log = [{"step": number, "loss": 1.0} for number in range(lines)]
    return write_json(path / "trainer_state.json", {"global_step": step, "log_history": log, **more})


def make_run(path: Path, *, steps: tuple[int, ...] = (2, 4), base: Path | None = None) -> Path:
    """A run by hand, of full models, or of adapters where there is a base."""
    for step in steps:
        directory = path / f"checkpoint-{step}"
        directory = make_full(directory) if base is None else make_adapter(directory, str(base))
        write_state(directory, step, lines=step)
    return path


def problem(run: Path, step: int = 4, **options: Any) -> str:
    """What is wrong with one checkpoint; the others must be sound."""
    (found,) = [each.problem for each in find_run(run, **options).checkpoints if each.step == step]
    assert all(each.problem is None for each in find_run(run, **options).checkpoints if each.step != step)
    assert found is not None
    return found
