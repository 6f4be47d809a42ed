"""What every client trains: a Llama of two layers, a tokenizer of bytes and a few pairs, made from nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["PAIRS", "make_model", "write_lines"]

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
FILMS = ["The film", "A soup", "This book", "Our trip", "The song", "That play", "His poem", "The game"]
GOOD = ["a quiet joy", "warm and worth the wait", "kind, and never dull", "bright"]
BAD = ["a loud bore", "cold", "long and worn out by its second half", "grim, and not in a good way"]

PAIRS = [
    {"prompt": f"{film} {number} was", "chosen": f"{GOOD[number % 4]} ({film}, {number}).",
     "rejected": f"{BAD[(number + 1) % 4]} [{film}, {number}]."}
    for number in range(5) for film in FILMS
]  # fmt: skip
"""40 pairs; every chosen and every rejected response is there once, so that a response tells its pair."""


def make_model(folder: Path) -> Path:
    """Write the model, in float32, and its tokenizer.

    Args:
        folder: where to.

    Returns:
        The folder.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=512,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines.

    Args:
        path: the file.
        rows: what to write.

    Returns:
        The path.
    """
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
