"""Every causal-LM family of transformers, built tiny from its config class.

A family is built generically: its config class is instantiated, the size fields that `SMALL` knows are replaced, and
of its layers as many are kept as it takes to show every kind. `OVERRIDES` holds what this way does not get right,
`UNBUILT` the families that cannot be measured as they are, each with its reason; a test keeps both true.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.zoo_tables import FLOAT32_ONLY, HEADS, OVERRIDES, SMALL, UNBUILT, VARIANTS

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Every model type that transformers maps to a causal LM."""

MEASURABLE = tuple(sorted({*FAMILIES, *VARIANTS} - set(UNBUILT)))
"""The families that run forward and backward, and the variants."""


def build(name: str, *, dtype: torch.dtype | None = None, experts: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A tiny model of the family, in eval mode, no parameter of which is constant.

    Args:
        name: a model type, such as "llama", or the name of a variant.
        dtype: of parameters and buffers; None for float64, or float32 where the family runs in nothing wider.
        experts: implementation of mixtures of experts; "eager" is the one that runs in float64.
        seed: of the initial weights.

    Returns:
        The model.
    """
    family, over = VARIANTS.get(name, (name, {}))
    if dtype is None:
        dtype = torch.float32 if family in FLOAT32_ONLY else torch.float64
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(family)(tiny_config(family, over))
        enliven(model)
    model.set_experts_implementation(experts)
    return model.eval().to(dtype)


def model_class(family: str) -> type[PreTrainedModel]:
    """The causal-LM class that transformers maps the family to."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])


def tiny_config(family: str, fields: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The family's config, shrunk, with `fields` on top; of a composite, the part that its causal-LM class takes."""
    config_class = CONFIG_MAPPING[family]
    over = _merge(OVERRIDES.get(family, {}), fields or {})
    config = config_class(**_merge(shrink(config_class(**over.pop("default", {}))), over))
    return config if isinstance(config, model_class(family).config_class) else config.get_text_config(decoder=True)


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Constructor arguments that make a small config of `config`'s class, nested for its sub-configs."""
    raw = config.to_dict()
    sized = {name for name, value in raw.items() if isinstance(value, (int, float, str))}
    special = {"pad_token_id", "bos_token_id", "eos_token_id"} & set(raw)
    small = {name: SMALL[name] for name in SMALL if name in sized | special}
    if "kv_lora_rank" in raw:  # multi-head latent attention expands its keys to all heads
        small["num_key_value_heads"] = HEADS
    small |= _layer_kinds(raw)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            small[name] = {"model_type": value.model_type, **shrink(value)}
    return small


def _layer_kinds(raw: dict[str, Any]) -> dict[str, Any]:
    """The shortest stack of layers that shows every kind named in the config's per-layer lists."""
    depth = raw.get("num_hidden_layers")
    lists = {
        name: value
        for name, value in raw.items()
        if isinstance(value, list) and len(value) == depth and all(isinstance(kind, str) for kind in value)
    }
    kept: list[int] = []
    for layer in range(depth or 0):
        if any(kinds[layer] not in [kinds[other] for other in kept] for kinds in lists.values()):
            kept.append(layer)
    if len(kept) < 2:
        return {}
    return {"num_hidden_layers": len(kept), **{name: [kinds[at] for at in kept] for name, kinds in lists.items()}}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if nested else value
    return merged


def enliven(model: nn.Module) -> None:
    """Adds noise to every parameter that is constant (norms at one, biases at zero), so that no gradient is trivial."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1 or bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
