"""Where a model comes from: a directory or hub id of a full model, or of a PEFT adapter and the base that it names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from gradent.errors import DataFileError, InputError, ModelError
from gradent.loading.files import brief, hint, is_hub_id, read_object, some
from gradent.loading.weight_files import named_adapters, require_tensors
from gradent.text import quoted

__all__ = [
    "STATE", "ModelSource", "State", "check_model_exists", "checkpoint_above", "read_adapter_file", "read_state",
    "read_step", "resolve_source", "trained_adapter",
]  # fmt: skip

STATE = "trainer_state.json"
_FROZEN = ("ref", "reference")  # names that TRL's users give an adapter that is the reference
_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "*token*", "*.jinja", "vocab*", "merges.txt"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from."""

    base: str  # directory or hub id of the full model
    adapter: str | None  # directory of the PEFT adapter on top of it, or None
    name: str  # what the user called it; the record's `checkpoint`
    # whether the adapter is switched off once it is loaded: what it changed of the base stays
    adapter_off: bool = False
    quantize: str | None = None  # how the base is quantized while it is loaded, one of QUANTIZATIONS, or not


@dataclass(frozen=True, kw_only=True)
class State:
    """What a trainer_state.json says."""

    path: Path
    step: int  # of the optimizer, when it was written
    lines: int  # entries of its log
    best: bool  # whether the trainer watched for the best checkpoint, and so may have gone back to it in the end


def resolve_source(
    model: str, adapter: str | None = None, *, weights: bool = True, quantize: str | None = None
) -> ModelSource:
    """Tell a full model from an adapter, and find the adapter's base."""
    check_model_exists(model)
    directory = _adapter_directory(model)
    source = ModelSource(base=model, adapter=None, name=model)
    if directory is not None and adapter is not None:
        raise InputError(
            f"{model} is itself a PEFT adapter (it has an adapter_config.json), and --adapter {adapter} was given as "
            "well. Give the base model as MODEL with one --adapter, or merge the first adapter into the base."
        )
    if directory is not None:
        source = ModelSource(base=_base_of(model, directory), adapter=directory, name=model, quantize=quantize)
    elif adapter is not None:
        check_model_exists(adapter)
        directory = _adapter_directory(adapter)
        if directory is None:
            raise InputError(f"{adapter}: not a PEFT adapter, for it has no adapter_config.json. Check --adapter.")
        source = ModelSource(base=model, adapter=directory, name=adapter, quantize=quantize)
    if quantize is not None and source.adapter is None:
        raise InputError(
            f"{model}: is a full model, and quantize={quantize!r} is for the base under an adapter, since quantized "
            "weights are not trained. Leave --quantize out, or give the adapter with --adapter."
        )
    if not weights:
        return source
    if Path(source.base).is_dir():  # a hub id is left to from_pretrained
        require_tensors(Path(source.base), "full")
    if source.adapter is not None:
        require_tensors(Path(source.adapter), "adapter")
    return source


def _base_of(name: str, adapter: str) -> str:
    base = read_adapter_file(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{name}: its adapter_config.json names no base model. Run: gradent audit BASE --adapter {name}"
        )
    if not _exists(base):
        raise ModelError(
            f"{name}: a PEFT adapter whose adapter_config.json names the base {base!r}, which does not exist here. "
            f"Run: gradent audit BASE --adapter {name}"
        )
    return base


def read_adapter_file(adapter: str) -> dict[str, Any]:
    """What an adapter's adapter_config.json says."""
    return read_object(Path(adapter) / "adapter_config.json")


def read_state(path: Path) -> State | None:
    """What a trainer_state.json says; None where there is none."""
    if not os.path.lexists(path):
        return None
    content = read_object(path)
    step, log = content.get("global_step"), content.get("log_history")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**18:
        raise DataFileError(
            f"{path}: global_step is {quoted(repr(step))}; a whole number is expected. Correct it, or remove the file."
        )
    lines = len(log) if isinstance(log, list) else 0
    return State(path=path, step=step, lines=lines, best=content.get("best_model_checkpoint") is not None)


def read_step(source: ModelSource) -> int:
    """The trainer's step at which a checkpoint was saved; 0 where nothing says so."""
    places = [Path(source.adapter or source.base), checkpoint_above(source.adapter)]
    states = [read_state(place / STATE) for place in places if place is not None]
    return next((state.step for state in states if state is not None), 0)


def checkpoint_above(adapter: str | None) -> Path | None:
    """The checkpoint of an adapter that lies in it in a folder of its name; None where it is a checkpoint itself."""
    above = None if adapter is None else Path(os.path.abspath(adapter)).parent
    return above if above is not None and re.fullmatch(r"checkpoint-\d+", above.name) else None


def trained_adapter(directory: Path) -> Path | None:
    """The adapter that was trained, of those in folders of their names; None where there are none."""
    named = named_adapters(directory)
    trained = [path for name, path in named.items() if name not in _FROZEN]
    if named and len(trained) != 1:
        raise ModelError(
            f"{directory}: holds adapters in folders of their names ({some(list(named), 8)}), and nothing says which "
            f"of them was trained. Give it as the model: gradent audit {directory / next(iter(named))}"
        )
    return trained[0] if named else None


def _adapter_directory(name: str) -> str | None:
    """The local directory of a PEFT adapter, fetched from the hub where needed; None if `name` is no adapter."""
    if Path(name).is_dir():
        found = trained_adapter(Path(name))
        if found is not None:
            return str(found)
        return name if (Path(name) / "adapter_config.json").is_file() else None
    from transformers.utils.peft_utils import find_adapter_config_file  # noqa: PLC0415  (a run is found without it)

    try:
        if find_adapter_config_file(name) is None:
            return None
        return str(snapshot_download(name, allow_patterns=_ADAPTER_FILES))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: the hub cannot be asked about it ({brief(error)}).{hint(name)}") from error


def _exists(name: str) -> bool:
    """A directory, or something that can be a hub id."""
    return Path(name).is_dir() or (not Path(name).exists() and is_hub_id(name))


def check_model_exists(name: str) -> None:
    """Refuse a name that is neither a directory nor a hub id."""
    if Path(name).is_file():
        raise InputError(
            f"{name}: is a file; give the directory that holds config.json and *.safetensors, or a hub id."
        )
    if not _exists(name):
        raise InputError(f"{name}: there is no such directory, and it is no hub id (owner/name) either.")
