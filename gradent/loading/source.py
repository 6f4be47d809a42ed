"""Where a model comes from: a directory or hub id of a full model, or of a PEFT adapter and the base that it names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradent.errors import InputError, ModelError

__all__ = ["ModelSource", "brief", "hint", "read_adapter_file", "read_step", "resolve_source", "some"]

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "*token*", "*.jinja", "vocab*", "merges.txt"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from."""

    base: str  # directory or hub id of the full model
    adapter: str | None  # directory of the PEFT adapter on top of it, or None
    name: str  # what the user called it; the record's `checkpoint`


def resolve_source(model: str, adapter: str | None = None, *, weights: bool = True) -> ModelSource:
    """Tell a full model from an adapter, and find the adapter's base."""
    _check_exists(model)
    own = _adapter_directory(model)
    if own is not None and adapter is not None:
        raise InputError(
            f"{model} is itself a PEFT adapter (it has an adapter_config.json), and --adapter {adapter} was given as "
            "well. Give the base model as MODEL with one --adapter, or merge the first adapter into the base."
        )
    if own is not None:
        source = ModelSource(base=_base_of(model, own), adapter=own, name=model)
    elif adapter is not None:
        _check_exists(adapter)
        directory = _adapter_directory(adapter)
        if directory is None:
            raise InputError(f"{adapter}: not a PEFT adapter, for it has no adapter_config.json. Check --adapter.")
        source = ModelSource(base=model, adapter=directory, name=adapter)
    else:
        source = ModelSource(base=model, adapter=None, name=model)
    if not weights:
        return source
    _require_safetensors(source.base, "AutoModelForCausalLM.from_pretrained({0!r}, use_safetensors=False)")
    if source.adapter is not None:
        _require_safetensors(source.adapter, "PeftModel.from_pretrained(base_model, {0!r})")
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
    return _read_json(Path(adapter) / "adapter_config.json")


def read_step(source: ModelSource) -> int:
    """The trainer's step at which a checkpoint was saved."""
    state = Path(source.adapter or source.base) / "trainer_state.json"
    step = _read_json(state).get("global_step", 0) if state.is_file() else 0
    if not isinstance(step, int):
        raise ModelError(f"{state}: global_step is {step!r}; a whole number is expected. Correct or remove the file.")
    return step


def _require_safetensors(name: str, loader: str) -> None:
    """Name pickled weights before from_pretrained reports them as missing; a hub id is left to from_pretrained."""
    directory = Path(name)
    if not directory.is_dir() or any(directory.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        raise ModelError(
            f"{name}: only pickled weights ({some(pickled)}), which can run code when they are loaded; gradent reads "
            f"safetensors. If you trust the file, convert it once: {loader.format(name)}.save_pretrained({name!r})"
        )
    raise ModelError(f"{name}: no weights in it (no *.safetensors file). Is it the right directory?")


def _adapter_directory(name: str) -> str | None:
    """The local directory of a PEFT adapter, fetched from the hub where needed; None if `name` is no adapter."""
    if Path(name).is_dir():
        return name if (Path(name) / "adapter_config.json").is_file() else None
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from transformers.utils.peft_utils import find_adapter_config_file  # noqa: PLC0415

    try:
        if find_adapter_config_file(name) is None:
            return None
        return str(snapshot_download(name, allow_patterns=_ADAPTER_FILES))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: the hub cannot be asked about it ({brief(error)}).{hint(name)}") from error


def _exists(name: str) -> bool:
    """A directory, or something that can be a hub id (`name` or `owner/name`)."""
    if Path(name).is_dir():
        return True
    parts = name.split("/")
    return len(parts) <= 2 and not Path(name).exists() and all(part and part.strip(".~") == part for part in parts)


def _check_exists(name: str) -> None:
    if Path(name).is_file():
        raise InputError(
            f"{name}: is a file; give the directory that holds config.json and *.safetensors, or a hub id."
        )
    if not _exists(name):
        raise InputError(f"{name}: there is no such directory, and it is no hub id (owner/name) either.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({brief(error)}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}; a JSON object is expected.")
    return content


def some(names: list[str], count: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def brief(error: BaseException) -> str:
    """The first lines of another library's message: they say what, and the rest repeats it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"


def hint(name: str) -> str:
    """What to look at where a name could not be loaded; nothing for a directory that is there."""
    if Path(name).is_dir():
        return ""
    return (
        " There is no such directory here; if it is a hub id, check it, your network and, for a gated model, "
        "`hf auth login`."
    )
