"""Tiny models on a quantized base, and the same with plain layers of the weights that the quantized ones stand for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.auditing.trained import make_base

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "fp4, twice": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32},
    "8 bit": {"load_in_8bit": True},
}
"""Kinds of quantization by bitsandbytes: fields of BitsAndBytesConfig."""


def make_plain(directory: Path) -> Path:
    """A tiny model of layers wide enough for a CPU to repack their 4-bit weights, and a tokenizer of few words."""
    make_base(directory)  # its tokenizer stays
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)  # or quantization would hardly move a log-prob
    model.save_pretrained(directory)
    return directory


def quantize(directory: Path, kind: str) -> Any:
    """The model of a directory, quantized while it is loaded."""
    from transformers import BitsAndBytesConfig  # noqa: PLC0415

    config = BitsAndBytesConfig(**KINDS[kind])
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)


def dequantized(model: nn.Module) -> Any:
    """A copy with a plain `nn.Linear` in place of each quantized one; by itself, this is plain autograd's."""
    import bitsandbytes as bnb  # noqa: PLC0415

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            elif isinstance(module, bnb.nn.Linear8bitLt):
                state = module.weight if module.weight.CB is not None else module.state
                weight = state.CB.float() * state.SCB[:, None].float() / 127
            else:
                continue
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            setattr(parent, name, plain)
    return model
