"""From modules to layers: `model.layers.3.mlp.up_proj` belongs to `model.layers.3`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names are read without torch, in reports too
    from gradent.pair_gram import ModuleGram

__all__ = ["group_layers", "layer_of", "unwrapped"]

_WRAPPERS = re.compile(r"^(base_model\.model\.|module\.|_orig_mod\.)+")


def unwrapped(module: str) -> str:
    """A module's dotted name without the wrappers in front of it (PEFT, DDP, torch.compile)."""
    return _WRAPPERS.sub("", module)


def layer_of(module: str) -> str:
    """A module's name up to its first number, or up to what an adapter adds below it; wrappers in front left out."""
    name = unwrapped(module)
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
        if part.startswith(("lora_", "modules_to_save")):
            return ".".join(parts[:position])
    return name


def group_layers(modules: Mapping[str, ModuleGram]) -> dict[str, ModuleGram]:
    """The modules' entries `{module: (chosen_sq, rejected_sq, inner)}`, float64 `[B]` each, summed by layer."""
    layers: dict[str, ModuleGram] = {}
    for module, (chosen_sq, rejected_sq, inner) in modules.items():
        layer = layer_of(module)
        if layer in layers:
            before = layers[layer]
            layers[layer] = (before[0] + chosen_sq, before[1] + rejected_sq, before[2] + inner)
        else:
            layers[layer] = (chosen_sq, rejected_sq, inner)
    return layers
