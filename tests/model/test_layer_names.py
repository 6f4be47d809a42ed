"""Layers by name: what PEFT, DDP and torch.compile put around a module's name does not make it another layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradent.model.layer_names import group_layers, layer_of
from tests.adapters import build_adapted, lora_everywhere
from tests.zoo import build

NAMES = {
    "model.layers.3.mlp.up_proj": "model.layers.3",
    "model.layers.12.self_attn.q_proj": "model.layers.12",
    "transformer.h.0.attn.c_attn": "transformer.h.0",
    "model.layers.3.mlp.experts.7.down_proj": "model.layers.3",
    "lm_head": "lm_head",
    "model.embed_tokens": "model.embed_tokens",
    "model.norm": "model.norm",
    "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default": "model.layers.3",
    "base_model.model.lm_head.modules_to_save.default": "lm_head",
    "base_model.model.model.embed_tokens.lora_embedding_A": "model.embed_tokens",
    "module.model.layers.3.mlp.up_proj": "model.layers.3",
    "_orig_mod.model.layers.3.mlp.up_proj": "model.layers.3",
    "module._orig_mod.base_model.model.model.layers.0.mlp.up_proj.lora_B.default": "model.layers.0",
    "": "",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    assert layer_of(module) == NAMES[module]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_an_adapter_or_a_wrapper_changes_no_layer(name: str) -> None:
    def layers(model: nn.Module) -> set[str]:
        return {layer_of(name.rpartition(".")[0]) for name, p in model.named_parameters() if p.requires_grad}

    model = build(name)
    plain = layers(model)
    assert layers(nn.Sequential()) == set()
    assert layers(nn.ModuleDict({"module": model})) == plain
    if name != "mixtral":
        adapted = layers(lora_everywhere(name))
        assert adapted and adapted <= plain
        assert all(layer.rpartition(".")[2].isdigit() for layer in adapted)


def test_saved_modules_are_named_like_those_they_stand_for() -> None:
    model = build_adapted("saved head")
    assert "lm_head" in {layer_of(n.rpartition(".")[0]) for n, p in model.named_parameters() if p.requires_grad}


def test_entries_are_summed_by_layer() -> None:
    def entry(value: float) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor([value, 10 * value], dtype=torch.float64) * scale for scale in (1, 2, 3))

    modules = {"a.0.x": entry(1), "b": entry(5), "a.0.y.z": entry(2), "a.1": entry(4)}
    layers = group_layers(modules)
    assert list(layers) == ["a.0", "b", "a.1"]
    assert [part.tolist() for part in layers["a.0"]] == [[3, 30], [6, 60], [9, 90]]
    assert [part.tolist() for part in layers["b"]] == [part.tolist() for part in modules["b"]]
    assert modules["a.0.x"][0].tolist() == [1, 10], "the modules' own entries are left alone"
