"""What `measure_tokens` holds on a long pair of a real size: 1,024 tokens, a Llama of 135M parameters.

    python -m benchmarks.token_memory

One pair of 1,000 prompt tokens and 24 + 23 completion tokens, float32, random weights, SmolLM2's shape. Scratch is the
most that the process held at once, from the kernel's own high-water mark, less what two forward passes with their
graphs hold. The sum of the matrix is compared with `measure`. Appends a line to benchmarks/results/token_memory.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import time
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.append import append
from benchmarks.tokens import held
from gradent import PairBatch, measure, measure_tokens

LIMIT = 2**31
"""Bytes of scratch that are allowed."""


def build(kind: str) -> nn.Module:
    """The model, all of it trainable or under LoRA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    if kind == "LoRA":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def main(
    kind: Annotated[str, typer.Option(help="LoRA or full.")] = "LoRA",
    prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens of chosen; rejected has one less.")] = 24,
    budget: Annotated[str, typer.Option(help="memory_budget.")] = "1GiB",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Measure one pair, print what it held."""
    torch.set_num_threads(threads)
    model, vocabulary = build(kind), 49152
    source = torch.Generator().manual_seed(1)
    parts = [
        torch.randint(0, vocabulary, (count,), generator=source).tolist() for count in (prompt, tokens, tokens - 1)
    ]
    batch = PairBatch.from_tokens([tuple(parts)])
    kept: dict[str, Any] = {}

    def forwards() -> None:
        kept["logits"] = [model(input_ids=batch.row(row)[0][None], use_cache=False).logits for row in (0, 1)]

    activations = held(forwards)
    if activations is None:
        raise typer.Exit(1)
    kept.clear()

    def tokenwise() -> None:
        (kept["gram"],) = measure_tokens(model, batch, memory_budget=budget, progress=False)

    began = time.perf_counter()
    whole = held(tokenwise) or 0
    seconds = time.perf_counter() - began
    gram, pair = kept["gram"], measure(model, batch)
    error = float((gram.inner.sum() - pair.inner[0]).abs() / (pair.chosen_sq * pair.rejected_sq).sqrt())
    scratch = whole - activations
    append(
        "token_memory",
        {
            "trainable": kind, "prompt": prompt, "tokens": f"{tokens}+{tokens - 1}", "threads": threads,
            "budget": budget,
            "forwards_mib": activations / 2**20, "peak_mib": whole / 2**20, "scratch_mib": scratch / 2**20,
            "seconds": seconds, "sum_error": error,
        },
    )  # fmt: skip
    verdict = "within" if scratch <= LIMIT else "ABOVE"
    Console(highlight=False).print(
        f"{kind}: two forwards {activations / 2**20:.0f} MiB, peak {whole / 2**20:.0f} MiB, scratch "
        f"{scratch / 2**20:.0f} MiB ({verdict} 2 GiB), {seconds:.0f} s, sum off by {error:.1e} (scaled)"
    )


if __name__ == "__main__":
    typer.run(main)
