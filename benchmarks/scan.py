"""What a scan costs: in forwards a response, and how its memory grows with the pairs.

    python -m benchmarks.scan
    python -m benchmarks.scan --model DIR --data pairs.jsonl

Without --model: Llamas with random weights and pairs of words. Two questions, each its own lines in
benchmarks/results/scan.csv:

- **forwards**: the stand-ins of some pairs (log-probs, CHES, the head's block) against the forwards alone that their
  log-probs take (`sequence_logps`), in turns; seconds are medians over rounds, the ratio is the median of the rounds'.
  `no_head` is the ratio without the head's block.
- **scale**: `gradent scan` without an exact sample, in a process of its own, on 200 to 10,000 pairs: seconds a pair
  and the most memory that the process held.

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
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.append import append
from benchmarks.callback import make_tokenizer
from gradent import PairBatch
from gradent.measurement import sequence_logps
from gradent.proxies import measure_proxies

SCALE = (200, 1200, 10_000)
SHAPES = {
    "tiny": {"layers": 2, "width": 64, "words": 512},
    "small": {"layers": 8, "width": 512, "words": 8192},
    "SmolLM2-135M": {"layers": 30, "width": 576, "words": 49152},
}
"""Of the last, the shape alone: weights are random."""

ONE_SCAN = """
import json, resource, sys, time, torch
torch.set_num_threads(1)
import gradent.scanning.pipeline
from gradent import scan
model, data, out = sys.argv[1:]
began = time.process_time()
scan(model, data, out=out, exact=0, report=False, quiet=True)
seconds = time.process_time() - began
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def main(
    model: Annotated[str | None, typer.Option(help="A checkpoint. [default: models made on the spot]")] = None,
    data: Annotated[str | None, typer.Option(help="Preference pairs, as JSON lines.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of a round.")] = 4,
    words: Annotated[int, typer.Option(help="Words of a response.")] = 128,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 5,
    shapes: Annotated[str, typer.Option(help="Of the models made on the spot.")] = ",".join(SHAPES),
    scale: Annotated[bool, typer.Option(help="Also scan 200 to 10,000 pairs.")] = True,
    save: Annotated[bool, typer.Option(help="Append to benchmarks/results/scan.csv.")] = True,
) -> None:
    """Measure, print, append."""
    torch.set_num_threads(1)
    found = []
    if model is not None and data is not None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        lines = Path(data).read_text("utf-8").splitlines()[:pairs]
        columns = [[json.loads(line)[key] for line in lines] for key in ("prompt", "chosen", "rejected")]
        batch = PairBatch.from_text(tokenizer, *columns, max_length=256)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        found.append(_compare(Path(model).name, loaded, batch, rounds))
    else:
        for name in shapes.split(","):
            found.append(_compare(name, _make(**SHAPES[name]), _draw(pairs, words, SHAPES[name]["words"]), rounds))
    found += [_scale(count) for count in SCALE] if scale else []
    for line in found:
        Console().print(line)
        if save:
            append("scan", line)


def _make(layers: int, width: int, words: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words, hidden_size=width, intermediate_size=8 * width // 3 // 8 * 8, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def _draw(pairs: int, words: int, vocabulary: int) -> PairBatch:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocabulary, (words // 4 + 2 * words,), generator=draw).tolist() for _ in range(pairs)]
    first, second = words // 4, words // 4 + words
    return PairBatch.from_tokens([(row[:first], row[first:second], row[second:]) for row in rows])


def _compare(name: str, model: torch.nn.Module, batch: PairBatch, rounds: int) -> dict[str, Any]:
    kinds = {
        "forward": lambda: sequence_logps(model, batch),
        "no_head": lambda: measure_proxies(model, batch, head=False),
        "scan": lambda: measure_proxies(model, batch),
    }
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, run in kinds.items():
            began = time.process_time()
            run()
            if number:  # the first is for warming up
                taken[kind].append(time.process_time() - began)
    ratio = {
        kind: statistics.median(a / b for a, b in zip(taken[kind], taken["forward"], strict=True))
        for kind in ("no_head", "scan")
    }
    return {
        "kind": "forwards", "model": name, "pairs": len(batch),
        "tokens": float(batch.attention_mask.sum(1).float().mean()),
        "seconds": statistics.median(taken["scan"]) / len(batch), "forwards": ratio["scan"],
        "no_head": ratio["no_head"], "mib": "",
    }  # fmt: skip


def _scale(count: int) -> dict[str, Any]:
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = SHAPES["tiny"]["words"]
        tokenizer = make_tokenizer(words)
        _make(**SHAPES["tiny"]).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        sizes = {"prompt": 10, "chosen": 25, "rejected": 25}
        rows = [
            {key: " ".join(f"w{chance.randrange(words - 2)}" for _ in range(size)) for key, size in sizes.items()}
            for _ in range(count)
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, "-c", ONE_SCAN, *(str(folder / part) for part in ("model", "pairs.jsonl", "out"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, mib = json.loads(done.stdout.splitlines()[-1])
    return {
        "kind": "scale", "model": "tiny", "pairs": count, "tokens": 35.0, "seconds": seconds / count, "forwards": "",
        "no_head": "", "mib": mib,
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
