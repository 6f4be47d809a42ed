"""Whether a model's files are whole, told from names, sizes and headers: nothing is loaded, and no pickle is opened.

A run may come from anywhere. What is read of it is bounded, and links that lead out of it are not followed.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from pathlib import Path
from typing import Any

from gradent.errors import ModelError
from gradent.loading.files import AGAIN, brief, leads_outside, read_object, some
from gradent.text import quoted

__all__ = [
    "ADAPTER_WEIGHTS", "CONFIGS", "check_links", "check_weights", "kind_of", "named_adapters", "require_tensors",
    "saved_names", "tidy_name",
]  # fmt: skip

CONFIGS = {"full": "config.json", "adapter": "adapter_config.json"}
"""Kind of a model to the file that describes it."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The file of an adapter's weights."""

_MOST_HEADER = 100_000_000  # safetensors' own bound
_INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"  # the directories in a model's that are read: this one,
_REFERENCE = "ref"  # and TRL's frozen copy of an adapter
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+|(?<=base_model\.model\.)(_orig_mod\.|module\.|base_model\.model\.)+")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TRAINER_STATE = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*")


def kind_of(directory: Path) -> str | None:
    """What a directory seems to hold, whole or not."""
    names = _names(directory)
    if CONFIGS["adapter"] in names or any(name.startswith("adapter_model.") for name in names):
        return "adapter"
    if CONFIGS["full"] in names or _INDEX in names or any(_is_weights(name) for name in names):
        return "full"
    return None


def named_adapters(directory: Path) -> dict[str, Path]:
    """Adapters that PEFT saved in folders of their names, where the directory itself holds no model."""
    if kind_of(directory) is not None:
        return {}
    names = [name for name in sorted(_names(directory)) if os.path.isfile(directory / name / CONFIGS["adapter"])]
    return {name: directory / name for name in names if not re.fullmatch(r"checkpoint-\d+", name)}


def check_weights(directory: Path, kind: str | None) -> None:
    """Refuse a directory whose weights are missing, pickled, sharded for training only, or not whole."""
    names = _names(directory)
    tensors = [name for name in names if name.endswith(".safetensors")]
    if kind == "adapter":
        tensors = [name for name in tensors if name == ADAPTER_WEIGHTS]
    if not tensors and _INDEX not in names:
        _refuse_without_tensors(directory, kind, names)
    needed = CONFIGS[kind or "full"]
    if needed not in names:
        raise ModelError(
            f"{directory}: weights without {needed}, so they cannot be told what model they are of. Copy {needed} "
            "there from the run's other checkpoints, or from where it was trained."
        )
    if kind != "adapter" and "model.safetensors" in names:
        tensors = ["model.safetensors"]  # which transformers prefers to shards
    elif kind != "adapter" and _INDEX in names:
        tensors = _shards(directory, names)
    for name in sorted(tensors):
        _refuse_empty(directory / name, _check_tensors(directory / name), names)


def require_tensors(directory: Path, kind: str) -> None:
    """Refuse a directory without safetensors; of other weights, say how to convert them."""
    names = _names(directory)
    if not any(name.endswith(".safetensors") for name in names):
        _refuse_without_tensors(directory, kind, names)
    for name in [ADAPTER_WEIGHTS] if kind == "adapter" else ["model.safetensors"]:
        if name in names:
            _refuse_empty(directory / name, _check_tensors(directory / name), names)


def saved_names(directory: Path) -> list[str]:
    """Names of a full model's weights, from the headers of its files."""
    names = _names(directory)
    if "model.safetensors" in names:
        return list(_check_tensors(directory / "model.safetensors"))
    return list(read_object(directory / _INDEX).get("weight_map", ())) if _INDEX in names else []


def tidy_name(name: str) -> str:
    """The name of an adapter's weight without what a wrapper (torch.compile, DDP, PEFT twice) put in it."""
    return re.sub(r"\.default(?=\.|$)", "", _WRAPPERS.sub("", _WRAPPERS.sub("", name)).replace("._orig_mod.", "."))


def check_links(directory: Path, root: Path) -> None:
    """Refuse a checkpoint that is, or holds, a link out of its run: what it shows would not be the run's."""
    # What is never opened (optimizer states and other pickles, directories) may lie anywhere.
    problem = (
        "is a link that leads out of the run's directory, and is not followed. If you trust the run, put what it "
        "points at in its place: copy the run with its links resolved (cp -rL RUN COPY) and audit the copy."
    )
    if leads_outside(directory, root):
        raise ModelError(f"{directory}: {problem}")
    try:
        for place in (directory, directory / _TEMPLATES, directory / _REFERENCE):
            for path in sorted(place.iterdir()) if place.is_dir() else ():
                opened = path.name in {_TEMPLATES, _REFERENCE} or not (path.is_dir() or _is_pickle(path.name))
                if path.is_symlink() and opened and leads_outside(path, root):
                    raise ModelError(f"{directory}: in it, {quoted(path.name)} {problem}")
    except OSError as error:
        raise ModelError(f"{directory}: cannot be read ({error.strerror}). Check its permissions.") from error


def _names(directory: Path) -> set[str]:
    """Everything that stands in a directory and is there: a link to nothing is not."""
    try:
        return {name for name in os.listdir(directory) if os.path.exists(directory / name)}
    except OSError as error:
        raise ModelError(f"{directory}: cannot be read ({error.strerror}). Check its permissions.") from error


def _is_pickle(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _PICKLED)


def _is_weights(name: str) -> bool:
    """Safetensors, or a pickle that is none of the trainer's own."""
    is_trainers = any(fnmatch.fnmatch(name, pattern) for pattern in _TRAINER_STATE)
    return name.endswith(".safetensors") or (_is_pickle(name) and not is_trainers)


def _refuse_without_tensors(directory: Path, kind: str | None, names: set[str]) -> None:
    sharded = sorted(name for name in names if name.startswith("pytorch_model_fsdp"))
    if sharded:
        saved = directory / sharded[0]
        remedy = f"load it once into the base with torch.load({str(saved)!r}, weights_only=True), and save_pretrained"
        if os.path.isdir(saved):
            remedy = f"put it together once: accelerate merge-weights {saved} {directory}"
        raise ModelError(
            f"{directory}: saved by FSDP as {some(sharded)}, which only training can read; gradent reads safetensors. "
            f"If you trust it, {remedy}"
        )
    engine = sorted(name for name in names if name.startswith("global_step"))
    if engine:
        raise ModelError(
            f"{directory}: saved by DeepSpeed as {some(engine)}, which only training can read; gradent reads "
            "safetensors. If you trust it, put it together once: python -m deepspeed.utils.zero_to_fp32 "
            f"{directory} {directory} --safe_serialization"
        )
    pickled = sorted(name for name in names if _is_weights(name) and not name.endswith(".safetensors"))
    if pickled:
        loader = f"AutoModelForCausalLM.from_pretrained({str(directory)!r}, use_safetensors=False)"
        if kind == "adapter":
            loader = f"PeftModel.from_pretrained(base_model, {str(directory)!r})"
        raise ModelError(
            f"{directory}: only pickled weights ({some(pickled)}), which can run code when they are loaded; gradent "
            f"reads safetensors. If you trust the file, convert it once: {loader}.save_pretrained({str(directory)!r})"
        )
    wanted = ADAPTER_WEIGHTS if kind == "adapter" else "*.safetensors"
    if kind == "full" and not (directory / "config.json").exists() and not directory.name.startswith("checkpoint-"):
        raise ModelError(
            f"{directory}: no weights in it (no {wanted} file), and no checkpoint-* of a run. Give what a trainer "
            "wrote (output_dir), one of its checkpoints, or a model."
        )
    raise ModelError(
        f"{directory}: no weights in it (no {wanted} file). It was left off while it was saved, or copied without "
        "its weights: copy it again from where the run was trained, or remove it."
    )


def _shards(directory: Path, names: set[str]) -> list[str]:
    """The files that an index names, all of them beside it."""
    index = directory / _INDEX
    tensors = read_object(index).get("weight_map")
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(name, str) for name in tensors.values()):
        raise ModelError(f"{index}: its weight_map does not name a file for each weight. {AGAIN}")
    shards = sorted(set(tensors.values()))
    odd = [name for name in shards if "/" in name or "\\" in name or not name.endswith(".safetensors")]
    if odd:
        raise ModelError(
            f"{index}: names {some([quoted(name) for name in odd])} as a file of weights; accepted are the names of "
            "*.safetensors files that stand beside it. Do not load this checkpoint unless you know who made it."
        )
    missing = [name for name in shards if name not in names]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of {len(shards)} files of weights that {_INDEX} names are missing: "
            f"{some([quoted(name) for name in missing])}. It was left off while it was saved or copied: copy it again "
            "from where the run was trained."
        )
    return shards


def _check_tensors(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file that is whole: 8 bytes (the header's length), the header (JSON), the data."""
    if not os.path.isfile(path):
        raise ModelError(f"{path}: is not a regular file; the weights themselves are expected there. {AGAIN}")
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER):
                stated = f" where its header should take {length}" if size >= 8 else ""
                raise ModelError(f"{path}: is no whole safetensors file: it has {size} bytes{stated}. {AGAIN}")
            header = json.loads(handle.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = [entry["data_offsets"] for entry in entries.values()]
        if not all(isinstance(end, int) and isinstance(start, int) and 0 <= start <= end for start, end in spans):
            raise ValueError("data_offsets are not what they should be")
        data = max((end for _, end in spans), default=0)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{path}: the header of this safetensors file cannot be read ({brief(error)}). {AGAIN}"
        ) from error
    if 8 + length + data != size:
        raise ModelError(f"{path}: has {size} bytes, and {8 + length + data} by its own header. {AGAIN}")
    return entries


def _refuse_empty(path: Path, entries: dict[str, Any], names: set[str]) -> None:
    """Refuse weights without a number in them, as ZeRO-3 leaves where they were saved without being gathered."""
    empty = sorted(name for name, entry in entries.items() if name.endswith("weight") and 0 in entry.get("shape", ()))
    if entries and not empty:
        return
    held = f"{len(empty)} of its {len(entries)} weights are empty" if entries else "there are no weights in it"
    remedy = (
        "Its own DeepSpeed states are not there either: measure another checkpoint, and train with "
        "stage3_gather_16bit_weights_on_model_save."
    )
    if any(name.startswith("global_step") for name in names):
        remedy = (
            "They are in its global_step*. If you trust it, put them together once: python -m "
            f"deepspeed.utils.zero_to_fp32 {path.parent} {path.parent / 'whole'} --safe_serialization"
        )
        if path.name == ADAPTER_WEIGHTS:
            remedy += (
                ", and save those whose names hold lora_, without the .default in them, as this file again "
                "(safetensors.torch.load_file, save_file)"
            )
    raise ModelError(f"{path}: {held}, as DeepSpeed ZeRO-3 leaves them where it does not gather them to save. {remedy}")
