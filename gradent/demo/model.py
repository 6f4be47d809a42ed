"""The embedded language model: a small Llama with random weights and a word-level tokenizer, built on the spot."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradent.demo.task import word_list

__all__ = ["build_model", "build_tokenizer"]

_SPECIALS = ("<pad>", "<eos>", "<unk>")
_POSITIONS = 64


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for every word of the task."""
    vocabulary = {word: number for number, word in enumerate([*_SPECIALS, *word_list()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=_POSITIONS
    )


def build_model(vocabulary: int, seed: int) -> Any:
    """A Llama of 2 layers and width 96 with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=96, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4,
        # Wider than the usual 0.02, which is meant for widths of some thousands: training starts at once.
        initializer_range=0.08,
        max_position_embeddings=_POSITIONS, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        return model.eval()
