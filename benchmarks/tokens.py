"""What the token level costs: `measure_tokens` and `token_effects` against the ways that are there without gradent.

    python -m benchmarks.tokens

One pair of 24 prompt tokens and 64 + 57 completion tokens, float32, random weights, in three ways, all of which first
agree with float64 backwards of a few tokens:

- *loop*, the paper's way: one backward a token, flattened gradients kept, then their products;
- *vmap(grad)*: `torch.func.vmap` over `grad` of one token's log-prob, gradients kept as well;
- gradent's `measure_tokens`.

Times are medians of runs that take turns. The unit is two plain forward and backward passes, of chosen and of rejected.
Memory is the most that the process held at once beyond what it held before, from the kernel's own high-water mark.
`effects` is `token_effects(toward="rejected")`, in the same unit. Appends a line a model to
benchmarks/results/tokens.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.append import append
from gradent import PairBatch, measure_tokens, token_effects

PROMPT, CHOSEN, REJECTED = 24, 64, 57
CHECKED = 4
"""Tokens of each side whose entries are compared with float64 backwards."""

SHAPES: dict[str, dict[str, Any]] = {
    # Most weights in the vocabulary, as small pretrained models have them (tied, 32,000 tokens).
    "15M, vocabulary 32000": {
        "vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 6, "tie_word_embeddings": True,
    },
    # Most weights in the layers, as large models have them.
    "10M, vocabulary 8192": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip

Row = tuple[Tensor, Tensor]


def build(shape: str, kind: str, dtype: torch.dtype) -> nn.Module:
    """A Llama with random weights, all trainable, or under LoRA (r=16 on every linear layer)."""
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=256))
    if kind == "LoRA":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    return model.to(dtype).eval()


def draw(vocabulary: int) -> PairBatch:
    """The pair."""
    source = torch.Generator().manual_seed(1)
    prompt, chosen, rejected = (
        torch.randint(0, vocabulary, (count,), generator=source).tolist() for count in (PROMPT, CHOSEN, REJECTED)
    )
    return PairBatch.from_tokens([(prompt, chosen, rejected)])


def token_logps(model: nn.Module, row: Row) -> Tensor:
    """`log π(y^a | x, y^{<a})` of every completion token, `[T]`."""
    ids, marks = row
    scores = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[1:, None])[:, 0][marks[1:]]


def by_loop(model: nn.Module, rows: list[Row], first: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One backward a token, gradients kept: `(inner, chosen_sq, rejected_sq)`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sides = []
    for row in rows:
        logps = token_logps(model, row)[:first]
        grads = [torch.autograd.grad(logp, parameters, retain_graph=True) for logp in logps]
        sides.append(torch.stack([torch.cat([part.flatten() for part in grad]) for grad in grads]))
    chosen, rejected = sides
    return chosen @ rejected.T, chosen.square().sum(1), rejected.square().sum(1)


def by_vmap(model: nn.Module, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """`vmap(grad)`, gradients kept: `(inner, chosen_sq, rejected_sq)`."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    sides = []
    for row in rows:
        ids, marks = row

        def logp(given: dict[str, Tensor], token: Tensor, ids: Tensor = ids, marks: Tensor = marks) -> Tensor:
            arguments = {"input_ids": ids[None], "use_cache": False}
            scores = torch.func.functional_call(model, given, (), arguments).logits[0, :-1].log_softmax(-1)
            return scores.gather(1, ids[1:, None])[:, 0][marks[1:]].gather(0, token[None])[0]

        tokens = torch.arange(int(marks.sum()))
        with sdpa_kernel([SDPBackend.MATH]):
            grads = torch.func.vmap(torch.func.grad(logp), in_dims=(None, 0))(values, tokens)
        sides.append(torch.cat([grad.flatten(1) for grad in grads.values()], 1))
    chosen, rejected = sides
    return chosen @ rejected.T, chosen.square().sum(1), rejected.square().sum(1)


def by_gradent(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """`(inner, chosen_sq, rejected_sq)`."""
    (gram,) = measure_tokens(model, batch, progress=False)
    return gram.inner, gram.chosen_sq, gram.rejected_sq


def two_passes(model: nn.Module, rows: list[Row]) -> None:
    """The unit: a plain forward and backward of chosen and of rejected."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for row in rows:
        torch.autograd.grad(token_logps(model, row).sum(), parameters)


def held(function: Callable[[], Any]) -> int | None:
    """Bytes that the process held at once beyond what it held before; None where the system does not say."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return None
    gc.collect()

    def read(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not count as held
    clear.write_text("5")
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


def compare(shape: str, kind: str, rounds: int) -> dict[str, Any]:
    """Errors, times and memory of one model."""
    model, batch = build(shape, kind, torch.float32), draw(SHAPES[shape]["vocab_size"])
    rows = [batch.row(row) for row in (0, 1)]
    truth = by_loop(build(shape, kind, torch.float64), rows, CHECKED)
    ways: dict[str, Callable[[], Any]] = {
        "loop": lambda: by_loop(model, rows),
        "vmap": lambda: by_vmap(model, rows),
        "gradent": lambda: by_gradent(model, batch),
    }
    figures: dict[str, Any] = {
        "model": shape, "trainable": kind, "tokens": f"{CHOSEN}+{REJECTED}", "threads": torch.get_num_threads(),
    }  # fmt: skip
    scale = (truth[1][:, None] * truth[2][None]).sqrt()
    for name, way in ways.items():
        inner = way()[0][:CHECKED, :CHECKED].double()
        figures[f"{name}_error"] = float(((inner - truth[0]).abs() / scale).max())
        figures[f"{name}_mib"] = (held(way) or 0) / 2**20
    timed = ways | {"unit": lambda: two_passes(model, rows), "effects": lambda: token_effects(model, batch)}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    timed["effects"]()
    for _ in range(rounds):
        for name, way in timed.items():
            for _ in range(5 if name in ("unit", "effects") else 1):
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures |= {f"{name}_s": medians[name] for name in timed}
    figures |= {
        "faster_than_loop": medians["loop"] / medians["gradent"],
        "faster_than_vmap": medians["vmap"] / medians["gradent"],
        "memory_of_loop": figures["gradent_mib"] / max(figures["loop_mib"], 1e-9),
        "effects_in_units": medians["effects"] / medians["unit"],
    }
    return figures


def main(
    rounds: Annotated[int, typer.Option(help="Runs of each way.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    only: Annotated[str, typer.Option(help="LoRA, full or both.")] = "both",
) -> None:
    """Run every model, print the ratios, append them to the results."""
    torch.set_num_threads(threads)
    table = Table(
        "model", "trainable", "error", "loop (s)", "vmap (s)", "gradent (s)", "x loop", "x vmap", "memory", "effects"
    )
    for kind in ("LoRA", "full") if only == "both" else (only,):
        for shape in SHAPES:
            figures = compare(shape, kind, rounds)
            append("tokens", figures)
            table.add_row(
                shape, kind, f"{figures['gradent_error']:.0e}",
                *(f"{figures[f'{name}_s']:.2f}" for name in ("loop", "vmap", "gradent")),
                *(f"{figures[f'faster_than_{name}']:.1f}" for name in ("loop", "vmap")),
                f"{figures['gradent_mib']:.0f} of {figures['loop_mib']:.0f} MiB", f"{figures['effects_in_units']:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
