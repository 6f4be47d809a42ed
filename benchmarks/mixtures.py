"""What measuring a mixture with trainable experts costs: a watched step against a plain one, and rows batched or not.

    python -m benchmarks.mixtures

A Qwen3-MoE of 4 layers, width 256, 8 experts of width 256 of which each token meets 2, random weights, float32: all of
it trainable, or LoRA (r=16) on the experts and the attention. Four pairs of rows of up to `--tokens` tokens, ragged.
`step` is a loop's forward, backward and AdamW step under `attach`, over the same without (with `account`, the account
of the step too, which a first step of the optimizer precedes). `measure` is a call with one row a forward over the
batched call. The ways take turns in rounds; a ratio is the median over rounds of a round's own, in the process's own
seconds. The two ways to measure are first compared with each other, scaled by the norms. Appends a line a case to
benchmarks/results/mixtures.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.append import append
from gradent import PairBatch, PairGram, attach, measure
from gradent.model.facts import Batching, facts

PAIRS = 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(kind: str, device: str, width: int, layers: int) -> nn.Module:
    """The model, in training mode."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=width, moe_intermediate_size=width, head_dim=width // 8,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=1024, pad_token_id=0, output_router_logits=False,
    )  # fmt: skip
    model: Any = Qwen3MoeForCausalLM(config)
    if kind == "LoRA":
        lora = LoraConfig(
            r=16, target_modules=ATTENTION, target_parameters=EXPERTS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    trained: nn.Module = model.to(device).train()
    return trained


def draw(tokens: int, device: str) -> PairBatch:
    """Pairs of ragged rows, half of the longest a prompt."""
    source = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high + 1, (1,), generator=source))
        return torch.randint(1, 2048, (count,), generator=source).tolist()

    half = tokens // 2
    rows = [(ids(half, half), ids(half // 2, half), ids(half // 2, half)) for _ in range(PAIRS)]
    batch = PairBatch.from_tokens(rows)
    parts = batch.input_ids, batch.attention_mask, batch.completion_mask
    return PairBatch(*(part.to(device) for part in parts))


def dpo(model: nn.Module, batch: PairBatch) -> Tensor:
    """DPO's loss against a reference of constant log-ratios."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    chosen, rejected = (logps * batch.completion_mask[:, 1:]).sum(1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def seconds(call: Callable[[], Any], device: str) -> float:
    """The process's own seconds of a call on a CPU, wall time on a GPU."""
    if device != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(ways: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one call that does not count."""
    for call in ways.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            found[name].append(seconds(call, device))
    return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """The median of the rounds' own."""
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


def difference(one: PairGram, other: PairGram) -> float:
    """How far two measurements lie apart, scaled by the norms."""
    parts = [
        (one.chosen_sq - other.chosen_sq) / other.chosen_sq,
        (one.rejected_sq - other.rejected_sq) / other.rejected_sq,
        (one.inner - other.inner) / (other.chosen_sq * other.rejected_sq).sqrt(),
    ]
    return float(torch.stack(parts).abs().max())


def case(kind: str, experts: str, tokens: int, rounds: int, device: str, width: int, layers: int) -> dict[str, Any]:
    """One line of the results."""
    model, batch = make(kind, device, width, layers), draw(tokens, device)
    model.set_experts_implementation(experts)  # type: ignore[operator]  (transformers')
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def plain() -> None:
        dpo(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    def watched(**options: Any) -> None:
        with attach(model, mode="piggyback", **options) as recorder:
            dpo(model, batch).backward()
            recorder.harvest()
            optimizer.step()
            optimizer.zero_grad()

    plain()
    steps = take_turns(
        {"plain": plain, "watched": watched, "account": lambda: watched(optimizer=optimizer)}, rounds, device
    )

    def rows(*, is_shared: bool) -> PairGram:
        facts(model).batching = Batching(is_shared=is_shared)
        return measure(model, batch)

    error = difference(rows(is_shared=True), rows(is_shared=False))
    calls = take_turns(
        {"batched": lambda: rows(is_shared=True), "single": lambda: rows(is_shared=False)}, rounds, device
    )
    return {
        "kind": kind, "experts": experts, "tokens": tokens, "error": f"{error:.1e}",
        "plain_s": round(statistics.median(steps["plain"]), 4),
        "step": round(ratio(steps, "watched", "plain"), 2), "account": round(ratio(steps, "account", "plain"), 2),
        "measure_s": round(statistics.median(calls["batched"]), 4),
        "measure": round(ratio(calls, "single", "batched"), 2),
    }  # fmt: skip


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each case.")] = 7,
    tokens: Annotated[str, typer.Option(help="Tokens of the longest row, comma-separated.")] = "32,128",
    experts: Annotated[str, typer.Option(help="Implementations of the experts, comma-separated.")] = "eager,grouped_mm",
    kinds: Annotated[str, typer.Option(help="What is trained, comma-separated.")] = "full,LoRA",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    width: Annotated[int, typer.Option(help="Of the model.")] = 256,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 4,
    save: Annotated[bool, typer.Option(help="Append to the results.")] = True,
) -> None:
    """Measure, print and append."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console, table = Console(width=120), None
    for kind in kinds.split(","):
        for way in experts.split(","):
            for length in map(int, tokens.split(",")):
                line = case(kind, way, length, rounds, device, width, layers)
                table = Table(*line) if table is None else table
                table.add_row(*map(str, line.values()))
                console.print(line)
                if save:
                    append("mixtures", line | {"width": width, "layers": layers, "rounds": rounds})
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
