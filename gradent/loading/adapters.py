"""PEFT adapters on the model that they were trained on: its rows of embeddings, its weights, and what lies under them.

An adapter is more than a few matrices on the base that it names. The trainer may have added tokens to the base, the way
in which the adapter starts may have changed the base, and TRL keeps a frozen copy of an adapter as the reference.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gradent.errors import ModelError
from gradent.loading.files import brief, some
from gradent.loading.source import ModelSource, read_adapter_file
from gradent.loading.weight_files import ADAPTER_WEIGHTS, CONFIGS, check_weights, tidy_name
from gradent.notices import warn

__all__ = ["changes_base", "embedding_rows", "frozen_reference", "put_adapter", "read_adapter", "under", "weight_names"]

_EMBEDDINGS = r"(embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings)"
_ROWS = re.compile(rf"(^|\.){_EMBEDDINGS}(\.modules_to_save|\.original_module|\.base_layer)?(\.default)?\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\..*lora_")
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # `init_lora_weights` that take their part off the base
_LOST = ("corda", "lora_ga")  # of these, what needs data that is not saved to do it again


def read_adapter(adapter: str, *, trainable: bool = True) -> Any:
    """The configuration of a PEFT adapter."""
    config = PeftConfig.from_pretrained(adapter)
    if trainable and config.is_prompt_learning:
        raise ModelError(
            f"{adapter}: {config.peft_type.value} adapters are saved without what trains them, and PEFT does not "
            "load them for training. In Python, call gradent.measure on the model while it trains."
        )
    return config


def frozen_reference(adapter: str) -> str | None:
    """The directory of the adapter that TRL kept, frozen, as the reference of this one; None where there is none."""
    # TRL (since 0.29) copies an adapter that is trained further into one named "ref", saved in a folder of that name.
    directory = Path(adapter) / "ref"
    if not (directory / CONFIGS["adapter"]).is_file():
        return None
    check_weights(directory, "adapter")
    return str(directory)


def changes_base(adapter: str) -> str | None:
    """The way in which an adapter starts, where it changes the base under it (PiSSA and its kin); else None."""
    start = read_adapter_file(adapter).get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(_CHANGING) else None


def embedding_rows(adapter: str | None) -> int | None:
    """Rows of the embedding that an adapter's file holds, read from its header; None where it holds none."""
    path = Path(adapter) / ADAPTER_WEIGHTS if adapter is not None else None
    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            rows = [int(file.get_slice(name).get_shape()[0]) for name in list(file.keys()) if _ROWS.search(name)]
    except (OSError, SafetensorError):  # a damaged file is told where it is loaded
        return None
    return max(rows, default=None)


def weight_names(adapter: str | None) -> list[str]:
    """Names of the weights that an adapter's file holds, from its header, without a wrapper's prefix."""
    path = Path(adapter) / ADAPTER_WEIGHTS if adapter is not None else None
    if path is None or not path.is_file():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            return [tidy_name(name) for name in list(file.keys())]
    except (OSError, SafetensorError):  # a damaged file is told where it is loaded
        return []


def under(base: str, adapter: str, quantize: str | None = None) -> ModelSource:
    """The model under an adapter, as the trainer's reference had it: the base, or what the adapter made of it."""
    if changes_base(adapter) is None and embedding_rows(adapter) is None:
        return ModelSource(base=base, adapter=None, name=base, quantize=quantize)
    return ModelSource(base=base, adapter=adapter, name=base, adapter_off=True, quantize=quantize)


def put_adapter(model: Any, source: ModelSource, trainable: bool) -> Any:
    """A loaded base with its adapter on it, or, of a source that says so, with the adapter switched off."""
    adapter, base = str(source.adapter), source.base
    start = changes_base(adapter)
    why = None if start is None else _cannot_start(start.lower())
    if why is not None:
        raise ModelError(
            f"{adapter}: it started by init_lora_weights={start!r}, which changed the base, {why}. Save the base as it "
            "was then (model.unload() of the trained PeftModel, save_pretrained), set init_lora_weights to true in "
            "adapter_config.json, and run: gradent audit ... --base DIR"
        )
    try:
        config = read_adapter(adapter, trainable=trainable)
        _resize(model, embedding_rows(adapter))
        with _tidy(adapter) as place:
            found: Any = PeftModel.from_pretrained(model, place, is_trainable=trainable)
            lacking = _lacking(found, place, config)
        _tell_of_experts(found, adapter)
        if source.adapter_off:
            found.base_model.disable_adapter_layers()
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(
            f"{adapter}: PEFT needs a package for it that is not installed ({brief(error)}). Install it with pip."
        ) from error
    except Exception as error:  # there is no end to what a damaged adapter raises
        raise ModelError(
            f"{adapter}: the adapter cannot be put on {base} ({brief(error)}). Is it an adapter for this base?"
        ) from error
    if lacking:
        raise ModelError(
            f"{adapter}: the adapter's file lacks weights that it needs on {base}: {some(lacking)}. They would stay "
            "at their initial values. Is it an adapter for this base?"
        )
    return found


def _cannot_start(start: str) -> str | None:
    """Why a start that changes the base cannot be made again here; None where it can."""
    if start.startswith(_LOST):
        return "by data that is not saved with it"
    if start.startswith("loftq") and not (torch.cuda.is_available() and find_spec("bitsandbytes")):
        return "and PEFT makes that again with bitsandbytes on a GPU alone (audit it on one)"
    return None


def _tell_of_experts(model: Any, adapter: str) -> None:
    """Say what differs where experts were adapted one by one, and are held in one matrix here."""
    one_by_one = any(_EXPERT.search(name) for name in weight_names(adapter))
    if one_by_one and not any(_EXPERT.search(name) for name, _ in model.named_parameters()):
        warn(
            f"{adapter}: its experts were adapted one by one, as transformers 4 had them, and transformers now holds "
            "them in one matrix: gate and up are one block-diagonal adapter of twice the rank. Log-probs are the "
            "run's; the zeros between the blocks count as trainable, so squares are somewhat larger than the run's."
        )


def _resize(model: Any, rows: int | None) -> None:
    """Give a base as many rows of embeddings as the trainer did; new ones are the mean of the others."""
    embedding = model.get_input_embeddings().weight
    if rows is None or rows == embedding.shape[0]:
        return
    before = int(embedding.shape[0])
    model.resize_token_embeddings(rows, mean_resizing=False)
    output = model.get_output_embeddings()
    with torch.no_grad():  # what the adapter's file holds of them is put over these
        for weight in [model.get_input_embeddings().weight, *([] if output is None else [output.weight])]:
            weight[before:] = weight[:before].mean(0)


@contextmanager
def _tidy(adapter: str) -> Iterator[str]:
    """The adapter's directory, or a copy in which the names of its weights are without a wrapper's prefix."""
    path = Path(adapter) / ADAPTER_WEIGHTS
    with safe_open(path, framework="pt") as file:
        names = {name: tidy_name(name) for name in list(file.keys())}
    if all(name == tidied for name, tidied in names.items()):
        yield adapter
        return
    if len(set(names.values())) < len(names):
        raise ModelError(
            f"{path}: names of its weights have a wrapper's prefix, and without it two are the same: "
            f"{some(sorted(names))}. Save the adapter again from the unwrapped model."
        )
    odd = next(name for name, tidied in names.items() if name != tidied)
    warn(f"{path}: names of its weights have a wrapper's prefix ({odd}), which is left off.")
    with tempfile.TemporaryDirectory() as place:
        copyfile(Path(adapter) / CONFIGS["adapter"], Path(place) / CONFIGS["adapter"])
        save_file({names[name]: tensor for name, tensor in load_file(path).items()}, Path(place) / ADAPTER_WEIGHTS)
        yield place


def _lacking(model: Any, adapter: str, config: Any) -> list[str]:
    """Weights of an adapter that its file did not fill."""
    with safe_open(Path(adapter) / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    # Without embeddings: PEFT adds them to what it saves where it sees fit, and asks the hub about it.
    lacking = sorted(set(get_peft_model_state_dict(model, save_embedding_layers=False)) - saved)
    if not lacking:
        return []
    # Names of older releases are converted while they are loaded, so PEFT is asked what stayed empty.
    result = model.load_adapter(adapter, "default", is_trainable=not config.inference_mode)
    prefix = getattr(model.base_model, "prefix", "lora_")
    empty = {name.replace(".default", "") for name in result.missing_keys}
    return [name for name in lacking if prefix not in name or name in empty]
