"""Vision-language models of transformers, tiny, over the words of `tests.auditing.trained`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, Gemma3Config, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

from tests.auditing.trained import WORDS, make_base

_TEXT = {
    "vocab_size": len(WORDS) + 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_IDS = {
    name: len(WORDS) + 3 + number
    for number, name in enumerate(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"))
}


def _qwen2_5_vl() -> Any:
    return Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}, **_IDS,
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 14,
        },
    )  # fmt: skip


def _qwen3_5() -> Any:
    from transformers import Qwen3_5Config  # noqa: PLC0415  (transformers 5)

    linear = {f"linear_{name}": 8 if "dim" in name else 2 for name in _LINEAR}
    rope = {**_ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    layers = ["linear_attention", "full_attention"]
    return Qwen3_5Config(
        text_config={**_TEXT, **linear, "head_dim": 8, "layer_types": layers, "rope_parameters": rope}, **_IDS,
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 14, "num_position_embeddings": 16,
        },
    )  # fmt: skip


_LINEAR = ("num_value_heads", "num_key_heads", "key_head_dim", "value_head_dim")


def _gemma3() -> Any:
    ids = {"image_token_index": _IDS["image_token_id"], "boi_token_index": _IDS["vision_start_token_id"]}
    return Gemma3Config(
        text_config={**_TEXT, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, eoi_token_index=_IDS["vision_end_token_id"], **ids,
    )  # fmt: skip


def _llava() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    return LlavaConfig(text_config=LlamaConfig(**_TEXT), vision_config=vision, image_token_index=_IDS["image_token_id"])


KINDS: dict[str, Callable[[], Any]] = {
    "Qwen2_5_VLForConditionalGeneration": _qwen2_5_vl,
    "Qwen3_5ForConditionalGeneration": _qwen3_5,
    "Gemma3ForConditionalGeneration": _gemma3,
    "LlavaForConditionalGeneration": _llava,
}
"""Class to what makes its configuration."""


def make(kind: str, path: Path) -> Path:
    """A model of a class with weights that do much, and a tokenizer of one token a word."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(KINDS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name or name.endswith("embed_tokens.weight"):
                parameter.mul_(20)
    model.save_pretrained(path)
    make_base(path.parent / "words")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(path.parent / "words" / name, path)
    return path


def load(kind: str, path: Path) -> Any:
    return getattr(transformers, kind).from_pretrained(path, dtype=torch.float32)
