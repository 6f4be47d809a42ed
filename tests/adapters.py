"""PEFT adapters to measure, each as a function of a base model from the zoo; no adapter parameter is constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from tests.zoo import build, enliven
from tests.zoo_tables import LORA_EXCLUDES, VARIANTS

GPT2, LLAMA, TIED, EXPERTS, OSS = "gpt2", "llama", "llama, biases, tied", "qwen3_moe", "gpt_oss"

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def adapt(model: PreTrainedModel, config: peft.PeftConfig, seed: int = 1) -> PeftModel:
    """The model with an adapter in its own dtype, in eval mode."""
    dtype = next(model.parameters()).dtype
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        enliven(adapted)
    return adapted.eval().to(dtype)


def lora_everywhere(name: str, dtype: torch.dtype | None = None) -> PeftModel:
    """The zoo's model of that name with LoRA on every linear layer that PEFT can adapt, the head left alone."""
    family = VARIANTS.get(name, (name, {}))[0]
    config = lora(target_modules="all-linear", exclude_modules=LORA_EXCLUDES.get(family))
    return adapt(build(name, dtype=dtype), config)


def lora(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, init_lora_weights=False, **fields)


def _on(kind: type[peft.PeftConfig], **fields: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: kind(task_type=TaskType.CAUSAL_LM, **fields)


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

ADAPTERS: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "LoRA on Conv1D": (GPT2, lambda: lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "rsLoRA": (LLAMA, lambda: lora(target_modules=ATTENTION, use_rslora=True)),
    "DoRA": (LLAMA, lambda: lora(target_modules="all-linear", use_dora=True)),
    "DoRA on Conv1D": (GPT2, lambda: lora(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)),
    "LoRA, every bias": (GPT2, lambda: lora(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
    "LoRA with its own bias": (LLAMA, lambda: lora(target_modules=ATTENTION, lora_bias=True)),
    "LoRA, ranks by pattern": (LLAMA, lambda: lora(target_modules=ATTENTION, rank_pattern={"q_proj": 2, "k_proj": 7})),
    "LoRA on embeddings": (LLAMA, lambda: lora(target_modules=["embed_tokens", "q_proj"])),
    "LoRA on positions": (GPT2, lambda: lora(target_modules=["wte", "wpe"])),
    "LoRA on tied embeddings": (GPT2, lambda: lora(target_modules=["wte", "c_attn"], fan_in_fan_out=True)),
    "LoRA on embeddings and head": (LLAMA, lambda: lora(target_modules=["embed_tokens", "lm_head"])),
    "DoRA on embeddings": (LLAMA, lambda: lora(target_modules=["embed_tokens"], use_dora=True)),
    "LoRA on Conv1d": ("mamba", lambda: lora(target_modules=["in_proj", "x_proj"])),
    "LoRA on fused experts": (EXPERTS, lambda: lora(target_parameters=FUSED)),
    "LoRA on fused experts and attention": (OSS, lambda: lora(target_modules=ATTENTION, target_parameters=FUSED)),
    "LoRA on a router": (EXPERTS, lambda: lora(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])),
    "LoRA, layers replicated": (LLAMA, lambda: lora(target_modules=ATTENTION, layer_replication=[(0, 2), (0, 2)])),
    "saved head": (LLAMA, lambda: lora(target_modules=ATTENTION, modules_to_save=["lm_head"])),
    "saved embeddings": (LLAMA, lambda: lora(target_modules=MLP, modules_to_save=["embed_tokens"])),
    "saved head of a tied model": (TIED, lambda: lora(target_modules=MLP, modules_to_save=["lm_head"])),
    "saved embeddings of a tied model": (TIED, lambda: lora(target_modules=MLP, modules_to_save=["embed_tokens"])),
    "saved norm": (LLAMA, lambda: lora(target_modules=MLP, modules_to_save=["norm", "lm_head"])),
    "new tokens": (LLAMA, lambda: lora(target_modules=ATTENTION, trainable_token_indices=[0, 8, 42, 44])),
    "new tokens of a tied model": (TIED, lambda: lora(target_modules=ATTENTION, trainable_token_indices=[0, 8, 42])),
    "IA3": (
        LLAMA,
        _on(peft.IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "IA3 on Conv1D": (
        GPT2,
        _on(peft.IA3Config, target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ),
    "prompt tuning": (LLAMA, _on(peft.PromptTuningConfig, num_virtual_tokens=3)),
    "prompt tuning, learned positions": (GPT2, _on(peft.PromptTuningConfig, num_virtual_tokens=3)),
    "p-tuning": (LLAMA, _on(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=12)),
    "prefix tuning": (LLAMA, _on(peft.PrefixTuningConfig, num_virtual_tokens=3)),
    "prefix tuning, projected": (GPT2, _on(peft.PrefixTuningConfig, num_virtual_tokens=3, prefix_projection=True)),
    "AdaLoRA": (LLAMA, _on(peft.AdaLoraConfig, target_modules=ATTENTION, init_r=4, target_r=2, total_step=10)),
    "LoHa": (LLAMA, _on(peft.LoHaConfig, target_modules=ATTENTION, r=3)),
    "LoKr": (LLAMA, _on(peft.LoKrConfig, target_modules=ATTENTION, r=3)),
    "OFT": (LLAMA, _on(peft.OFTConfig, target_modules=ATTENTION, oft_block_size=8, use_cayley_neumann=False)),
    "VeRA": (LLAMA, _on(peft.VeraConfig, target_modules=["q_proj"], r=4)),
    "norm tuning": (LLAMA, _on(peft.LNTuningConfig, target_modules=["input_layernorm", "post_attention_layernorm"])),
    "FourierFT": (LLAMA, _on(peft.FourierFTConfig, target_modules=["q_proj", "v_proj"], n_frequency=20)),
}
"""Adapter to (base model, config)."""


def build_adapted(name: str, dtype: torch.dtype | None = None) -> PeftModel:
    base, config = ADAPTERS[name]
    return adapt(build(base, dtype=dtype), config())
