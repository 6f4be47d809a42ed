"""Is the likelihood term that the account asks for the right size? DPO runs, and the same runs with that term.

    python -m benchmarks.nll_weight --data qa.jsonl --model models/stories260K

`--data` is a file of preference rows (prompt, chosen, rejected), each prompt used once; `--model` is fine-tuned on the
chosen responses of 200 of them first. Each run is TRL's DPOTrainer with β = 0.1, and held-out pairs of other prompts
are looked at before and after. A run of plain DPO is measured at every step; the reading is `needed_weight` of its
steps from the 10th on: the weight of TRL's likelihood term (`loss_type=["sigmoid", "sft"]`) with which, to first order,
chosen of a pair outside of the batch would not have fallen. Then the run is repeated with that weight throughout, with
half of it, with twice of it, with 1 (RPO), and with `AdaptiveNLLDPOTrainer`. Where DPO's chosen does not fall, the
reading is 0 and nothing is repeated but RPO and the adaptive run.

Columns: changes of held-out chosen and rejected, nats a response; "late", that of chosen in the steps which the reading
speaks of; share of held-out pairs whose margin over the reference grew; change of the log-prob of a token of other text
(the prompts of the held-out pairs), nats: what it loses, the run has forgotten.
Appends a line a run to benchmarks/results/nll_weight.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

import copy
import json
import random
import tempfile
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.append import append
from benchmarks.unseen import EARLY, Row, to_batch
from gradent import EntanglementCallback, GradentError, PairBatch
from gradent.attribution.likelihood import estimate_nll, needed_weight
from gradent.measurement import sequence_logps
from gradent.trainer.adaptive_nll.trainer import AdaptiveNLLDPOConfig, AdaptiveNLLDPOTrainer

LENGTH, BETA, BATCH, HELD_OUT, TUNED = 160, 0.1, 8, 48, 200
OPTIMIZERS = {
    "SGD": {"optim": "sgd", "max_grad_norm": 0.0},
    "SGD, momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.0},
    "AdamW": {"optim": "adamw_torch", "weight_decay": 0.01},
}


@dataclass(frozen=True)
class Start:
    """The tuned model, its tokenizer, the training rows and the held-out pairs."""

    model: Any
    tokenizer: Any
    rows: list[Row]
    held_out: PairBatch
    prompts: Any

    def look(self, model: Any) -> tuple[torch.Tensor, float]:
        """Log-probs of the held-out pairs `[2, m]`, and of a token of their prompts."""
        logps = torch.stack([part.double() for part in sequence_logps(model, self.held_out)])
        ids, attention = self.prompts.input_ids, self.prompts.attention_mask
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
        model.train(was_training)
        each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * attention[:, 1:]
        return logps, float(each.sum() / attention[:, 1:].sum())


class Middle(TrainerCallback):
    """A look at the held-out pairs after step `EARLY`."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self.logps: torch.Tensor | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look."""
        if state.global_step == EARLY:
            self.logps = self._start.look(kwargs["model"])[0]


def prepare(folder: Path, data: list[Row], seed: int, steps: int, rate: float) -> Start:
    """One row a prompt, drawn by seed; the first are held out, the next tuned on, the rest trained on."""
    tokenizer, shuffled = AutoTokenizer.from_pretrained(folder), random.Random(seed)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    by_prompt = defaultdict(list)
    for row in data:
        by_prompt[row["prompt"]].append(row)
    rows: list[Row] = []
    for prompt in shuffled.sample(list(by_prompt), len(by_prompt)):
        row = shuffled.choice(by_prompt[prompt])
        try:
            to_batch(tokenizer, [row], LENGTH)
        except GradentError:  # too long, or cut to one and the same
            continue
        rows.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
    held, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    tuned = min(TUNED, len(rows) // 3)
    torch.manual_seed(seed)
    batch, optimizer = to_batch(tokenizer, rows[:tuned], LENGTH), torch.optim.AdamW(model.parameters(), rate)
    for _ in range(150):
        picked = torch.randperm(tuned)[:16]
        ids, marks = batch.input_ids[picked], batch.completion_mask[picked, 1:]
        logits = model(input_ids=ids, attention_mask=batch.attention_mask[picked]).logits[:, :-1]
        loss = -(logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * marks).sum() / marks.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompts = tokenizer(
        [row["prompt"] for row in held], return_tensors="pt", padding=True, truncation=True, max_length=LENGTH
    )
    return Start(model, tokenizer, rows[tuned : tuned + steps * BATCH], to_batch(tokenizer, held, LENGTH), prompts)


def train(start: Start, optimizer: str, lr: float, steps: int, seed: int, lora: bool, weight: float | None) -> Any:
    """One run: figures, DPO's reading, and the mean weight; `weight` None for the adaptive trainer."""
    adaptive = weight is None
    kind, config = (AdaptiveNLLDPOTrainer, AdaptiveNLLDPOConfig) if adaptive else (DPOTrainer, DPOConfig)
    callback = EntanglementCallback(every=1, alert=None, panels=False, on_error="raise")
    term: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight]} if weight else {}
    model, middle = copy.deepcopy(start.model), Middle(start)
    with tempfile.TemporaryDirectory() as out:
        trainer = kind(
            model=model,
            ref_model=None if lora else copy.deepcopy(start.model),
            args=config(
                output_dir=out, max_steps=min(steps, len(start.rows) // BATCH), per_device_train_batch_size=BATCH,
                max_length=LENGTH, bf16=False, report_to="none", save_strategy="no", logging_steps=1, learning_rate=lr,
                disable_tqdm=True, use_cpu=True, gradient_checkpointing=False, seed=seed, beta=BETA, log_level="error",
                dataloader_drop_last=True, **OPTIMIZERS[optimizer], **term,
            ),
            train_dataset=Dataset.from_list(start.rows),
            processing_class=start.tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
            callbacks=[callback, middle] if weight == 0 else [middle],
        )  # fmt: skip
        before, other_before = start.look(trainer.model)
        trainer.train()
        after, other_after = start.look(trainer.model)
    effects = [
        estimate_nll(record.attribution, record.verdict.d_w, record.gram.chosen_len)
        for record in callback.records
        if record.step > EARLY and record.attribution is not None
    ]
    known = [effect for effect in effects if effect is not None]
    weights = [entry["nll_weight"] for entry in trainer.state.log_history if "nll_weight" in entry]
    chosen, rejected = (after - before).mean(1).tolist()
    grown = (after[0] - before[0] > after[1] - before[1]).double().mean()
    return {
        "chosen": chosen, "rejected": rejected, "late": float((after - middle.logps)[0].mean()),
        "grown": float(grown), "other": other_after - other_before, "steps": trainer.state.global_step,
        "weight": sum(weights) / len(weights) if adaptive else weight,
    }, needed_weight(known, unseen=True) if known else (float("nan"), float("nan"))  # fmt: skip


def main(
    data: Annotated[Path, typer.Option(help="JSON lines of preference rows.")],
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    optimizers: Annotated[str, typer.Option(help="Names and rates, with semicolons: 'AdamW 1e-4; SGD 1e-2'.")],
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run, at most.")] = 60,
    tune: Annotated[float, typer.Option(help="Learning rate of the fine-tuning.")] = 1e-3,
    lora: Annotated[bool, typer.Option("--lora", help="Train LoRA (r = 8 on every linear layer).")] = False,
    save: Annotated[bool, typer.Option(help="Append to the results.")] = True,
) -> None:
    """Train, read, train again."""
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines() if line.strip()]
    for seed in map(int, seeds.split(",")):
        start = prepare(model, rows, seed, steps, tune)
        for setting in optimizers.split(";"):
            name, _, rate = setting.strip().rpartition(" ")
            options = (start, name, float(rate), steps, seed, lora)
            plain, (reading, error) = train(*options, 0.0)
            repeats: dict[str, float | None] = {"RPO": 1.0, "adaptive": None}
            if reading > 0:
                repeats = {"reading": reading, "half": reading / 2, "twice": reading * 2} | repeats
            found = {"DPO": plain} | {method: train(*options, weight)[0] for method, weight in repeats.items()}
            for method, figures in found.items():
                line = {
                    "model": model.name + (", LoRA" if lora else ""), "data": data.stem, "optimizer": name, "lr": rate,
                    "seed": seed, "method": method, "reading": reading, "error": error, **figures,
                }  # fmt: skip
                typer.echo(
                    "  ".join(
                        f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in line.items()
                    )
                )
                if save:
                    append("nll_weight", line)


if __name__ == "__main__":
    typer.run(main)
