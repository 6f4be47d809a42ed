"""What an audit costs: pairs a second against the paper's way on the same checkpoint, and how that grows with pairs.

    python -m benchmarks.audit
    python -m benchmarks.audit --model DIR --data pairs.jsonl

Without --model: a Llama of 4 layers and width 64 with random weights and pairs of words. Two questions, each its own
lines in benchmarks/results/audit.csv:

- **script**: the paper's way, as its published scripts do it: batch size 1, for each response a forward, a backward
  and a copy of every parameter's gradient, then dot products parameter by parameter. It and gradent's scan (pairs of
  like length in batches of 8) take turns in rounds on the same pairs; seconds are medians, the ratio is the median over
  rounds. Both are first compared: the error is scaled by `‖g_w‖‖g_l‖`.
- **scale**: `gradent audit` as a user runs it (no report), in a process of its own, on 64 to 4,096 pairs of the same
  distribution: seconds beyond those of the smallest run, pairs a second, and the most memory that the process held.

One thread; seconds are the process's own (`time.process_time`), so that other work on the machine counts little.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.append import append
from benchmarks.callback import make_tokenizer
from gradent.auditing.analysis.columns import gram_of
from gradent.auditing.measuring.batches import join_blocks, measure_batches, plan_batches
from gradent.loading.config import LoadConfig
from gradent.loading.models import load_model
from gradent.loading.preferences import AuditPair
from gradent.loading.prepare import read_material
from gradent.loading.source import resolve_source

WORDS = 2000
SCALE = (64, 256, 1024, 4096)
BATCH = 8

ONE_AUDIT = """
import json, resource, sys, time
import gradent.auditing.pipeline
from gradent import audit
model, data, pairs, out = sys.argv[1:]
began = time.process_time()
audit(model, data, out=out, max_pairs=int(pairs), loss="simpo", skip_bad_rows=True, report=False, quiet=True)
seconds = time.process_time() - began
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def main(
    model: Annotated[str | None, typer.Option(help="A checkpoint. [default: a small one made on the spot]")] = None,
    data: Annotated[str | None, typer.Option(help="Preference pairs. [default: pairs of words]")] = None,
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt + response.")] = 256,
    pairs: Annotated[int, typer.Option(help="Pairs of the comparison with the script.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of the comparison.")] = 3,
    scale: Annotated[bool, typer.Option(help="Also audit 64 to 4,096 pairs.")] = True,
    save: Annotated[bool, typer.Option(help="Append to benchmarks/results/audit.csv.")] = True,
) -> None:
    """Measure, print, append."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = model or make_model(Path(folder) / "model")
        rows = data or make_pairs(Path(folder) / "pairs.jsonl", max(SCALE))
        name = Path(model).name if model else "Llama, 4 layers of 64"
        source = Path(data).name if data else "words"
        lines = [
            {"question": "script", "model": name, "data": source, "measured": kind, **figures}
            for kind in ("full", "LoRA")
            for figures in [compare(place, rows, kind, max_length, pairs, rounds)]
        ]
        if scale:
            lines += [{"question": "scale", "model": name, "data": source, "measured": "full", **figures}
                      for figures in grow(place, rows, Path(folder))]  # fmt: skip
    columns = ("question", "model", "data", "measured", "pairs", "tokens", "error", "seconds", "pairs_per_second",
               "script_pairs_per_second", "ratio", "mib")  # fmt: skip
    table = Table(*columns)
    for line in lines:
        whole = {column: line.get(column, "") for column in columns}
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in whole.values()))
        if save:
            append("audit", whole)
    Console(width=180).print(table)


def make_model(folder: Path) -> str:
    """A small checkpoint; returns its directory."""
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(WORDS)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=172, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_pairs(path: Path, count: int) -> str:
    """Pairs of random words, the responses of 8 to 120 words, sharing some of them; returns the file."""
    chance = random.Random(0)

    def words(least: int, most: int) -> str:
        return "".join(f" w{chance.randrange(WORDS)}" for _ in range(chance.randint(least, most)))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            shared = words(4, 60)
            row = {"prompt": words(10, 40).strip(), "chosen": words(4, 60) + shared, "rejected": words(4, 60) + shared}
            file.write(json.dumps(row) + "\n")
    return str(path)


def compare(place: str, data: str, kind: str, max_length: int, count: int, rounds: int) -> dict[str, Any]:
    """The script's way and gradent's, in turns."""
    source = resolve_source(place)
    config = LoadConfig(model=place, data=data, max_length=max_length, max_pairs=count, skip_bad_rows=True)
    material = read_material([source], config, lambda _: None)
    model: nn.Module = load_model(source)
    if kind == "LoRA":
        torch.manual_seed(0)
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
    drawn = material.pairs.pairs
    batches = plan_batches(drawn, BATCH)
    seconds: dict[str, list[float]] = {"script": [], "scan": []}
    for _ in range(rounds + 1):  # the first is for warming up
        began = time.process_time()
        apart = by_script(model, drawn)
        seconds["script"].append(time.process_time() - began)
        began = time.process_time()
        gram = gram_of(join_blocks(list(measure_batches(model, drawn, batches))).table)
        seconds["scan"].append(time.process_time() - began)
    scale = (apart[:, 0] * apart[:, 1]).sqrt()
    ratios = [script / scan for script, scan in zip(seconds["script"][1:], seconds["scan"][1:], strict=True)]
    middle = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    return {
        "pairs": len(drawn),
        "tokens": sum(each.tokens for each in drawn),
        "error": float(((gram.inner - apart[:, 2]) / scale).abs().max()),
        "seconds": middle["scan"],
        "pairs_per_second": len(drawn) / middle["scan"],
        "script_pairs_per_second": len(drawn) / middle["script"],
        "ratio": statistics.median(ratios),
    }


def by_script(model: nn.Module, pairs: list[AuditPair]) -> Tensor:
    """`‖g_w‖²`, `‖g_l‖²` and `⟨g_w, g_l⟩`, float64 `[P, 3]`, one response at a time."""
    found = []
    for pair in pairs:
        chosen, rejected = (gradients(model, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids))
        entries = [0.0, 0.0, 0.0]
        for name, one in chosen.items():
            other = rejected[name]
            for place, (left, right) in enumerate(((one, one), (other, other), (one, other))):
                entries[place] += float(torch.dot(left.flatten(), right.flatten()))
        found.append(entries)
    return torch.tensor(found, dtype=torch.float64)


def gradients(model: nn.Module, prompt: list[int], response: list[int]) -> dict[str, Tensor]:
    """A copy of every parameter's gradient of one response's log-prob."""
    model.zero_grad()
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum().backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def grow(place: str, data: str, folder: Path) -> list[dict[str, Any]]:
    """Whole audits of more and more pairs."""
    lines: list[dict[str, Any]] = []
    for count in SCALE:
        command = [sys.executable, "-W", "ignore", "-c", ONE_AUDIT, place, data, str(count), str(folder / str(count))]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        seconds, mib = json.loads(done.stdout.splitlines()[-1])
        more = count - SCALE[0]
        since = (seconds - lines[0]["seconds"]) if lines else None
        lines.append(
            {"pairs": count, "seconds": seconds, "mib": mib, "pairs_per_second": more / since if since else ""}
        )
    return lines


if __name__ == "__main__":
    typer.run(main)
