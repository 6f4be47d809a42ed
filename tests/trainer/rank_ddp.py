"""One rank of a DPO run under DDP, started by test_ranks.py; writes what it has seen."""

from __future__ import annotations

import hashlib
import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from gradent import EntanglementCallback
from tests.zoo import build

STEPS = 3


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `w3` to `w96`; 0 is padding."""
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(3, 97))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def pairs(words: int = 94) -> Dataset:
    """24 pairs of texts of so many different words."""
    draw = torch.Generator().manual_seed(0)

    def text(count: int) -> str:
        return " ".join(f"w{n}" for n in torch.randint(3, 3 + words, (count,), generator=draw).tolist())

    rows = [{"prompt": text(3), "chosen": " " + text(2 + n % 4), "rejected": " " + text(5 - n % 3)} for n in range(24)]
    return Dataset.from_list(rows)


def leave(out: Path, rank: int, seen: dict[str, Any]) -> None:
    """Write what a rank saw, and end its process."""
    (out / f"{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.barrier()
    # gloo's destructor can wait for ever for a peer that has gone: leave without it.
    os._exit(0)


def main(
    out: Path, watched: bool, batch: int, budget: int | None = None, arguments: dict[str, Any] | None = None,
    words: int = 94,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    model = build("llama", dtype=torch.float32)
    callback = EntanglementCallback(every=1, realised=True, out=out / "records", on_error="raise", memory_budget=budget)
    settings = {
        "output_dir": str(out / "run"), "max_steps": STEPS, "per_device_train_batch_size": batch, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "learning_rate": 1e-3, "save_strategy": "no",
        "disable_tqdm": True, **(arguments or {}),
    }  # fmt: skip
    trainer = DPOTrainer(
        model=model,
        ref_model=deepcopy(model),
        args=DPOConfig(**settings),
        train_dataset=pairs(words),
        processing_class=tokenizer(),
        callbacks=[callback] if watched else [],
    )  # fmt: skip
    trainer.train()
    state = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    logs = [{k: v for k, v in entry.items() if k.startswith("gradent/")} for entry in trainer.state.log_history]
    seen = {
        "weights": hashlib.sha256(state).hexdigest(),
        "cosines": [record.gram.cosine.tolist() for record in callback.records],
        "realised": [record.chosen_realised.tolist() for record in callback.records],
        "totals": [record.attribution.total.tolist() for record in callback.records if record.attribution],
        "elsewhere": [
            float(record.attribution.moved["earlier_batches"].abs().mean())
            for record in callback.records
            if record.attribution
        ],
        "whole": [record.attribution.is_whole for record in callback.records if record.attribution],
        "sketch_errors": [record.attribution.sketch_error for record in callback.records if record.attribution],
        "left": [record.attribution.sketch is not None for record in callback.records if record.attribution],
        "rests": [float(record.attribution.rest.norm()) for record in callback.records if record.attribution],
        "explained": [record.attribution.explained for record in callback.records if record.attribution],
        "sources": [record.source for record in callback.records],
        "logs": [entry for entry in logs if entry],
    }
    leave(out, trainer.args.process_index, seen)
