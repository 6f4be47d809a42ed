"""How much of what really moved do accounts of a step explain? Real DPO runs, every step measured, in one table.

    python -m benchmarks.account --data qa.jsonl --models stories260K --models stories15M

`--data` is a file of preference rows (prompt, chosen, rejected), `--models` folders of causal language models; "demo"
is the model that `gradent demo` builds and fine-tunes, with its own pairs (prefix and suffix), and needs no data. Each
is trained by TRL's DPOTrainer (AdamW, β = 0.1, batches of 4 pairs, clipping at 1, a linear schedule) for `--warm` steps
and then `--steps` more, all measured with `EntanglementCallback(every=1, realised=True)`, under LoRA (r = 8 on every
linear layer) and in full. A row says which share of the variance (against zero) of the realised changes of every
response's log-prob is explained, and how often the sign is right, by

- the pair alone: the verdict of Conditions 1 and 2 (plain gradient descent on one pair), its best single scale fitted;
- the account, unfitted: all pairs, clipping, Adam's preconditioner as it is before the step, momentum and weight decay.

Appends a line a row to benchmarks/results/account.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from benchmarks.append import append
from gradent import EntanglementCallback
from gradent.attribution.step import StepAttribution
from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.settings import EMBEDDED
from gradent.demo.task import STYLES, make_task, text_rows
from gradent.demo.train import train_sft
from gradent.record import MOVED_SOURCES


def make_demo(folder: Path) -> list[dict[str, str]]:
    """Save the demo's fine-tuned model to a folder; returns its pairs."""
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), seed=0)
    task = make_task(seed=0, train=EMBEDDED.train, probe=EMBEDDED.probe, answers=12 * EMBEDDED.train)
    train_sft(model, tokenizer, task, EMBEDDED, seed=0, advance=lambda step: None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return text_rows(task.train, list(STYLES)[-1], task.label_words)


def train(
    folder: Path, rows: list[dict[str, Any]], *, lora: bool, lr: float, steps: int, out: str, **options: Any
) -> EntanglementCallback:
    """The callback of one run."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    callback = EntanglementCallback(every=1, realised=True, alert=None, on_error="raise", **options)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=out, max_steps=steps, per_device_train_batch_size=4, max_length=128, bf16=False,
            report_to="none", save_strategy="no", logging_steps=steps, learning_rate=lr, weight_decay=0.01,
            disable_tqdm=True, use_cpu=True, gradient_checkpointing=False, seed=0,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    return callback


def share(predicted: Tensor, realised: Tensor) -> float:
    """Share of the variance against zero."""
    return 1 - float((realised - predicted).square().sum() / realised.square().sum())


def judge(callback: EntanglementCallback, warm: int) -> dict[str, float]:
    """The figures of a run's row."""
    records = [record for record in callback.records if record.step > warm]
    accounts = [record.attribution for record in records if record.attribution is not None]
    joined = StepAttribution.join(accounts)
    assert joined.realised is not None
    alone = torch.cat([
        *(record.verdict.chosen_change for record in records), *(record.verdict.rejected_change for record in records)
    ])  # fmt: skip
    realised = torch.cat([
        *(record.chosen_realised for record in records if record.chosen_realised is not None),
        *(record.rejected_realised for record in records if record.rejected_realised is not None),
    ])  # fmt: skip
    scale = float((alone * realised).sum() / alone.square().sum())
    parts = {source: float(joined.moved[source].abs().mean()) for source in MOVED_SOURCES}
    return {
        "responses": len(realised), "mean_change": float(realised.abs().mean()),
        "pair_alone": share(scale * alone, realised),
        "pair_alone_sign": float((alone.sign() == realised.sign()).double().mean()),
        "account": share(joined.total, joined.realised),
        "account_sign": float((joined.total.sign() == joined.realised.sign()).double().mean()), **parts,
    }  # fmt: skip


def main(
    models: Annotated[list[Path], typer.Option(help='Folders of models, or "demo".')],
    data: Annotated[Path | None, typer.Option(help="JSON lines of preference rows.")] = None,
    rates: Annotated[str, typer.Option(help="Learning rates, full parameters.")] = "1e-6,1e-5",
    lora_rates: Annotated[str, typer.Option(help="Learning rates, LoRA.")] = "1e-5,1e-4",
    warm: Annotated[int, typer.Option(help="Steps before those that count.")] = 20,
    steps: Annotated[int, typer.Option(help="Steps that count.")] = 30,
    mode: Annotated[str, typer.Option(help="auto, or measure: a pass of its own, with P after the step.")] = "auto",
    save: Annotated[bool, typer.Option(help="Append to the results.")] = True,
) -> None:
    """Train every model, print the table, append it to the results."""
    lines = [] if data is None else [json.loads(line) for line in data.read_text().splitlines()]
    given = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in lines]
    table = Table("run", "mean |change|", "pair alone", "sign", "account", "sign", *MOVED_SOURCES)
    runs = [("full", rate) for rate in rates.split(",") if rate] + [("LoRA", rate) for rate in lora_rates.split(",")]
    home = Path(tempfile.mkdtemp())
    for name in models:
        is_demo = str(name) == "demo"
        folder, rows = (home / "demo", make_demo(home / "demo")) if is_demo else (name, given)
        for kind, lr in runs:
            with tempfile.TemporaryDirectory() as out:
                is_lora = kind == "LoRA"
                callback = train(folder, rows, lora=is_lora, lr=float(lr), steps=warm + steps, out=out, mode=mode)
            found = judge(callback, warm)
            shown = [found[key] for key in ("mean_change", "pair_alone", "pair_alone_sign", "account", "account_sign")]
            run = f"{folder.name}, {kind}, lr {lr}"
            table.add_row(run, *(f"{value:.4f}" for value in [*shown, *(found[key] for key in MOVED_SOURCES)]))
            print(run, {key: round(value, 4) for key, value in found.items()}, flush=True)
            if save:
                append("account", {"run": run, "mode": mode, "steps": steps, "warm": warm, **found})
    Console(width=180).print(table)


if __name__ == "__main__":
    typer.run(main)
