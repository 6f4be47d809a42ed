"""Adapters that hold more than low-rank matrices on linear layers, or under names of older releases."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.auditing.made import write_jsonl
from tests.auditing.situations import (
    LORA,
    ROWS,
    assert_right,
    audited,
    base_of,
    measured,
    plain,
    same,
    tokenizer_of,
    train,
)
from tests.auditing.trained import WORDS, make_base

KINDS = {
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 6, 7]},
    "tokens of a named embedding": {"trainable_token_indices": {"embed_tokens": [5, 9]}},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "rank stabilized": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_with_more_than_low_rank_matrices(kind, tmp_path) -> None:
    run = train(base_of(tmp_path), tmp_path, peft={**LORA, **KINDS[kind]})
    result = audited(tmp_path)
    policy = PeftModel.from_pretrained(base_of(tmp_path), run / "checkpoint-4", is_trainable=True)
    assert_right(result, 4, policy, tokenizer_of(tmp_path))
    same(measured(result, 4, reference=True), plain(base_of(tmp_path), tokenizer_of(tmp_path)))
    assert result.summary["doubt"] is None


EXPERTS, RANK, WIDTH, INNER = 4, 2, 16, 12


def make_experts(path) -> None:
    """A tiny mixture of experts with the words of other tests."""
    make_base(path)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(WORDS) + 3, hidden_size=WIDTH, intermediate_size=24, moe_intermediate_size=INNER,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=2,
        max_position_embeddings=64, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(path)


def old_adapter(path, base) -> dict[str, torch.Tensor]:
    """An adapter of one matrix an expert, as transformers 4 had them; returns what each adds to its weight."""
    torch.manual_seed(1)
    sizes = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    weights, added = {}, {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for name, (out, width) in sizes.items():
                module = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                left, right = torch.randn(RANK, width) / 2, torch.randn(out, RANK) / 2
                weights[f"base_model.model.{module}.lora_A.weight"] = left
                weights[f"base_model.model.{module}.lora_B.weight"] = right
                added[module] = right @ left
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": RANK, "target_modules": list(sizes), "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return added


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 has experts one by one")
def test_experts_that_were_adapted_one_by_one(tmp_path) -> None:
    make_experts(tmp_path / "base")
    added = old_adapter(tmp_path / "adapter", tmp_path / "base")
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    result = audited(tmp_path, tmp_path / "adapter", loss="simpo")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        for module, change in added.items():
            layer, expert, name = (module.split(".")[place] for place in (2, 5, 6))
            experts = merged.model.layers[int(layer)].mlp.experts
            if name == "down_proj":
                experts.down_proj[int(expert)] += change
            else:
                experts.gate_up_proj[int(expert)][slice(INNER) if name == "gate_proj" else slice(INNER, None)] += change
    same(measured(result, 0), plain(merged, tokenizer_of(tmp_path)))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert_right(result, 0, policy, tokenizer_of(tmp_path))
    assert any("one by one" in note and "block-diagonal" in note for note in result.summary["notes"])
