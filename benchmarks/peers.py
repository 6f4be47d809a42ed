"""What a measurement costs beside the other ways of making it: gradent's two against its peers, same pairs, one run.

    python3 -m venv .venv-peers
    .venv-peers/bin/pip install -c constraints.txt hatchling editables
    .venv-peers/bin/pip install -c constraints.txt --no-build-isolation -e '.[peers]'
    .venv-peers/bin/pip install -c constraints.txt --no-deps backpack-for-pytorch
    .venv-peers/bin/python -m benchmarks.peers

(BackPACK asks for torchvision, which it does not use here, hence `--no-deps`; a peer that is not installed is listed as
such.) Random weights, float32: a GPT-2 of 4 layers and width 256 with tied embeddings, all of it trainable, and a Llama
of the same size under LoRA (r=16 on every linear layer). Pairs are ragged. Each method is first compared with float64
autograd, one unpadded row at a time; the error is scaled by `‖g_i‖‖g_j‖`. What is wrong or cannot wrap the model is
listed with the reason. `--size small` takes GPT-2's own size instead, and a Llama as wide and deep, at 10 times the
time.

The unit is one plain forward and backward of DPO's loss on the same pairs, all rows in one padded batch. Methods take
turns in rounds, each called once before the call that counts; seconds are medians, and ratios are medians over rounds
of the ratio to the round's own unit. The piggyback is the unit with gradent watching less a unit without right after
it; "shared" is weight_grad="shared". MiB is the most that the process held at once beyond what it held before, from the
kernel's own high-water mark; the piggyback's is what it adds to the unit's. The floor is a forward and a backward of
activations alone (the faster of single rows and gradent's own groups) and the cheaper contraction's FLOPs at the speed
of a square matrix product, all in the same rounds. `--clock cpu` counts the process's own seconds, for a machine that
is not idle.

Appends a line a method and case to benchmarks/results/peers.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import importlib.metadata
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.append import append
from benchmarks.peer_methods import METHODS, WATCHED, frozen_pass, plain_step, stack, trainable, unpadded
from benchmarks.tokens import held
from gradent import PairBatch
from gradent.hooks.passes.batching import group_rows
from gradent.kernels.common.cost import DEFAULT_BUDGET, choose


@dataclass(frozen=True)
class Size:
    """Of a model; `inner` is the width inside a Llama's MLP."""

    layers: int
    width: int
    heads: int
    inner: int
    gpt2_vocabulary: int
    llama_vocabulary: int


SIZES = {"mini": Size(4, 256, 8, 704, 8192, 8192), "small": Size(12, 768, 12, 2048, 50257, 32000)}
"""`small` is GPT-2's own size (124M parameters), and a Llama of the same width."""
CASES = {"single": (1, 192), "short": (8, 64), "medium": (4, 192), "long": (4, 512)}
"""Pairs, and tokens of the longest row."""
EXACT = 1e-4
"""Scaled error beyond which a method is wrong."""
GEMM = 1024
UNIT = "unit"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Found:
    """What was found out about a method."""

    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    mib: float | None = None
    note: str = ""


def build(kind: str, dtype: torch.dtype, size: Size) -> nn.Module:
    """The model, in eval mode."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "GPT-2, full":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size.gpt2_vocabulary, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
                n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size.llama_vocabulary, hidden_size=size.width, intermediate_size=size.inner,
                num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=4,
                max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    return model.to(dtype).eval()


def draw(pairs: int, longest: int, vocabulary: int) -> PairBatch:
    """Ragged pairs: rows of half to all of `longest` tokens, a third of them prompt; one row is the longest."""
    source = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=source).tolist()

    parts = []
    for pair in range(pairs):
        sizes = torch.randint(longest // 2, longest + 1, (2,), generator=source).tolist()
        sizes = [longest, sizes[1]] if pair == 0 else sizes
        prompt = min(sizes) // 3
        parts.append((tokens(prompt), *(tokens(size - prompt) for size in sizes)))
    return PairBatch.from_tokens(parts)


def scaled_error(entries: Tensor, truth: Tensor) -> float:
    """Largest error over pairs and entries, by the norms' product."""
    scale = torch.stack((truth[:, 0], truth[:, 1], (truth[:, 0] * truth[:, 1]).sqrt()), 1)
    return float(((entries - truth).abs() / scale).max())


def floor_flops(model: nn.Module, batch: PairBatch) -> int:
    """FLOPs of the cheaper contraction, over every trainable matrix that takes part in a product, and pair."""
    shapes = [p.shape for p in trainable(model) if p.dim() == 2]
    looked = [
        module.weight.shape
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight.requires_grad
    ]
    tied = isinstance(model, GPT2LMHeadModel)
    for shape in looked[tied:]:  # the first is the head as well
        shapes.remove(shape)
    total = 0
    for pair in range(len(batch)):
        t_w, t_l = (len(batch.row(row)[0]) for row in (pair, pair + len(batch)))
        total += sum(choose(t_w, t_l, *shape, itemsize=4, budget=DEFAULT_BUDGET).flops for shape in shapes)
    return total


def prepare(model: nn.Module, batch: PairBatch, truth: Tensor, only: str) -> tuple[dict[str, Found], dict[str, Any]]:
    """Make every method, compare it with the truth, and see what it holds; what fails is kept with the reason."""
    found: dict[str, Found] = {}
    ways: dict[str, Callable[[], Any]] = {}
    for name, make in {**METHODS, **WATCHED}.items():
        if only and not name.startswith(tuple(only.split(","))):
            continue
        plain = name.removesuffix(", position_ids")
        if plain != name and plain in ways:
            continue  # it needs no help with this model
        one = found[name] = Found()
        try:
            way = make(model, batch)
            one.error = scaled_error(way(), truth)
            if not one.error <= EXACT:
                one.note = "wrong"
                continue
            one.mib = (held(way) or 0) / 2**20
        except Exception as error:  # noqa: BLE001  (a peer's failure is a finding)
            one.note = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        ways[name] = way
    step = plain_step(model, batch)
    step()
    found[UNIT] = Found(mib=(held(step) or 0) / 2**20)
    for name in WATCHED.keys() & ways.keys():
        found[name].note = f"the whole step: {found[name].mib:.0f} MiB"
        found[name].mib = (found[name].mib or 0) - (found[UNIT].mib or 0)
    return found, {UNIT: step, **ways}


Clock = Callable[[], float]


def timed(way: Callable[[], Any], clock: Clock) -> float:
    """Seconds of one call."""
    began = clock()
    way()
    return clock() - began


def compare(kind: str, case: str, size: Size, rounds: int, only: str, clock: Clock) -> tuple[dict[str, Found], float]:
    """One model and case.

    Args:
        kind: the model.
        case: of `CASES`.
        size: of `SIZES`.
        rounds: of all methods.
        only: beginnings of the methods' names, comma-separated; "" for all.
        clock: gives seconds.

    Returns:
        What was found by method, and the matrix product's GFLOP/s.
    """
    vocabulary = size.gpt2_vocabulary if kind.startswith("GPT-2") else size.llama_vocabulary
    model, batch = build(kind, torch.float32, size), draw(*CASES[case], vocabulary)
    truth = METHODS["two backwards"](build(kind, torch.float64, size), batch)()
    found, ways = prepare(model, batch, truth, only)
    rows = unpadded(batch)
    groups = group_rows([len(ids) for ids, _ in rows], torch.device("cpu"))
    floors = {
        "floor, single rows": frozen_pass(copy.deepcopy(model), [stack([row]) for row in rows]),
        "floor, groups": frozen_pass(copy.deepcopy(model), [stack([rows[row] for row in group]) for group in groups]),
    }
    square = torch.randn(GEMM, GEMM)
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, *floors, "gemm")}
    for way in floors.values():
        way()
    for _ in range(rounds):
        for name, way in {**ways, **floors}.items():
            way()  # what the method before left in caches and allocator is not this one's cost
            seconds[name].append(timed(way, clock))
            if name in WATCHED:  # against a unit right beside it
                seconds[name][-1] -= timed(ways[UNIT], clock)
        seconds["gemm"].append(min(timed(lambda: square @ square, clock) for _ in range(3)))
    speed = 2 * GEMM**3 / statistics.median(seconds["gemm"])
    units = seconds[UNIT]
    for name in ways:
        found[name].seconds = seconds[name]
        found[name].ratios = [one / unit for one, unit in zip(seconds[name], units, strict=True)]
    activations = min(statistics.median(seconds[name]) for name in floors)
    contraction = floor_flops(model, batch) / speed
    floor = activations + contraction
    found["floor"] = Found(
        seconds=[floor], ratios=[floor / statistics.median(units)],
        note=f"passes {activations:.4f} s, contractions {contraction:.4f} s at {speed / 1e9:.0f} GFLOP/s",
    )  # fmt: skip
    if "gradent measure" in ways:
        times = statistics.median(seconds["gradent measure"]) / floor
        found["gradent measure"].note = f"{times:.2f} of the floor"
    return found, speed / 1e9


def versions() -> str:
    """Of the peers, where installed."""
    names = ("opacus", "backpack-for-pytorch")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return " ".join(f"{name} {version}" for name, version in found.items())


def main(
    rounds: Annotated[int, typer.Option(help="Turns of every method.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    kinds: Annotated[str, typer.Option(help="Models, semicolon-separated.")] = "GPT-2, full;Llama, LoRA",
    size: Annotated[str, typer.Option(help=f"Of the models: {', '.join(SIZES)}.")] = "mini",
    cases: Annotated[str, typer.Option(help="Cases, comma-separated.")] = ",".join(CASES),
    only: Annotated[str, typer.Option(help="Beginnings of methods' names, comma-separated; default all.")] = "",
    clock: Annotated[str, typer.Option(help="wall, or cpu: the process's own seconds.")] = "wall",
    save: Annotated[bool, typer.Option(help="Append to the results.")] = True,
) -> None:
    """Run every model and case, print the ratios, append them to the results."""
    torch.set_num_threads(threads)
    logging.getLogger("gradent").setLevel(logging.ERROR)
    console = Console(width=150)
    for kind in kinds.split(";"):
        for case in cases.split(","):
            found, speed = compare(kind, case, SIZES[size], rounds, only, CLOCKS[clock])
            pairs, longest = CASES[case]
            named = kind if size == "mini" else f"{kind} ({size})"
            title = f"{named}, {pairs} pairs, T ≤ {longest} ({speed:.0f} GFLOP/s)"
            table = Table("method", "error", "seconds", "ratio to unit", "MiB", "note", title=title)
            for name, one in found.items():
                middle = statistics.median(one.seconds) if one.seconds else None
                ratio = statistics.median(one.ratios) if one.ratios else None
                shown = (f"{one.error:.0e}" if one.error is not None else "", *(
                    "" if value is None else f"{value:{form}}"
                    for value, form in ((middle, ".3f"), (ratio, ".2f"), (one.mib, ".0f"))
                ))  # fmt: skip
                table.add_row(name, *shown, one.note)
                if save:
                    append("peers", {
                        "peers": versions(), "threads": threads, "clock": clock, "model": named,
                        "tokens": longest, "pairs": pairs, "method": name, "error": one.error, "seconds": middle,
                        "ratio": ratio, "mib": one.mib, "note": one.note,
                    })  # fmt: skip
            console.print(table)


if __name__ == "__main__":
    typer.run(main)
