"""Does a step's account tell what the step does to pairs that are not in its batch? DPO runs beside held-out pairs.

    python -m benchmarks.unseen --data qa.jsonl --models models

`--data` is a file of preference rows (prompt, chosen, rejected), `--models` a folder with the models that `RUNS` names.
Each run is TRL's DPOTrainer (AdamW, β = 0.1, a linear schedule), measured at every step. The leave-one-out estimate of
a step is, for each side, the mean over the batch's k rows of what the *other* pairs push them (times k / (k − 1), so
that as many pairs push as would push an unseen one) plus momentum and weight decay: no row is moved by itself. It is
summed over steps 2 to 9, whose P rests on few gradients (Adam's first has no account), and over the rest, beside what
held-out pairs show in the same steps, all in nats:

- estimate: its sum, with the standard error that follows from the spread over the batches' rows;
- first order: the held-out pairs' mean `⟨g_i, Δθ⟩`, summed: what the estimate estimates;
- both ends: the same with the mean of g_i before and after each step, so with curvature, to second order;
- real: the change of the held-out pairs' log-probs, with the standard error from their spread;
- z: (estimate − real) in standard errors of both;
- carried: the part of momentum and decay alone, of the batches' rows and of the held-out pairs;
- rewards: the mean of `log π − log π_ref` of the last batches' rows *before* their step (TRL's `rewards/chosen` over
  β), with the standard error from the spread over steps, and level: the held-out pairs' mean at those very steps.

Held-out pairs are of other prompts than the training pairs ("other"), and where prompts are shared among pairs also of
the training pairs' prompts ("same"). Appends a line a run, part, held-out set and side to
benchmarks/results/unseen.csv. `--summary` reads that file instead, and prints how often z is small in each kind of run.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import csv
import itertools
import json
import math
import random
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.append import RESULTS, append
from gradent import EntanglementCallback, GradentError, PairBatch
from gradent.attribution.step import StepAttribution
from gradent.attribution.update_rule import UpdateRule, find_update_rule
from gradent.model.parameters import trainable

LENGTH, BETA = 128, 0.1
EARLY = 9
"""Steps in which Adam's second moment is mostly the newest gradients': summed apart."""
SIDES = ("chosen", "rejected")

Row = dict[str, str]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        model: folder's name.
        lora: train LoRA (r = 8 on every linear layer), not all parameters.
        lr: learning rate.
        batch: pairs of a step.
        steps: optimizer steps.
        pairs: training pairs at most; fewer than `steps * batch` make more than one epoch.
        prompts: 0 for one pair a prompt, else all pairs of that many prompts, shuffled.
        copies: how often every training pair is in the data.
        max_norm: of clipping.
        mode: the callback's.
        held_out: pairs of each held-out set.
        cuts: last steps of the parts that are summed apart, but for the last part's.
    """

    model: str = "stories260K"
    lora: bool = False
    lr: float = 1e-5
    batch: int = 8
    steps: int = 32
    pairs: int = 10**6
    prompts: int = 0
    copies: int = 1
    max_norm: float = 1.0
    mode: str = "auto"
    held_out: int = 48
    cuts: tuple[int, ...] = (EARLY,)


FULL, LORA = Run(), Run(lora=True)
RUNS: dict[str, Run] = {
    "full 1e-6": replace(FULL, lr=1e-6), "full 1e-5": FULL, "full 1e-4": replace(FULL, lr=1e-4),
    "LoRA 1e-5": LORA, "LoRA 1e-4": replace(LORA, lr=1e-4), "LoRA 1e-3": replace(LORA, lr=1e-3),
    "2 pairs": replace(FULL, batch=2), "4 pairs": replace(FULL, batch=4),
    "16 pairs": replace(FULL, batch=16, steps=24),
    "P after": replace(FULL, mode="measure"), "P after 1e-4": replace(FULL, mode="measure", lr=1e-4),
    "clipped": replace(FULL, max_norm=0.05),
    "shared prompts": replace(FULL, prompts=80), "shared prompts 1e-4": replace(FULL, prompts=80, lr=1e-4),
    "many prompts 1e-4": replace(FULL, prompts=350, lr=1e-4),
    "copies": replace(FULL, pairs=64, copies=4), "copies 1e-4": replace(FULL, pairs=64, copies=4, lr=1e-4),
    "4 epochs": replace(FULL, pairs=64), "4 epochs 1e-4": replace(FULL, pairs=64, lr=1e-4),
    "2 epochs 1e-4": replace(FULL, pairs=128, lr=1e-4, cuts=(EARLY, 16)),
    "16 epochs": replace(FULL, pairs=16),
    "stories15M LoRA": replace(LORA, model="stories15M", lr=1e-4, steps=24, held_out=32),
}  # fmt: skip


@dataclass
class HeldOut(TrainerCallback):
    """What every step does to pairs that are not in it, really and to first order.

    Attributes:
        batch: held-out pairs.
        members: name of a held-out set to its m pairs' numbers.
        logps: `[sets, 2, m]` before the first step and after each.
        along: per step, the sets' mean `⟨g_i, ·⟩` `[sets, 2, 4]` with the step's carried part (momentum, decay), with
            its fresh part, with the step as it was, and the last once more with g_i taken after the step.
        rewards: per step, the mean `log π − log π_ref` of its rows before it, (chosen, rejected).
    """

    batch: PairBatch
    members: dict[str, list[int]]
    logps: list[Tensor] = field(default_factory=list)
    along: list[Tensor] = field(default_factory=list)
    rewards: list[tuple[float, float]] = field(default_factory=list)

    def _look(self, model: nn.Module) -> None:
        """Log-probs, and each set's mean gradient."""
        parameters = trainable(model)
        was_training = model.training
        model.eval()
        self._gradients, logps = [], []
        for numbers, side in itertools.product(self.members.values(), (0, 1)):
            rows = [number + side * len(self.batch) for number in numbers]
            ids, marks = self.batch.input_ids[rows], self.batch.completion_mask[rows, 1:]
            with torch.enable_grad():
                logits = model(input_ids=ids, attention_mask=self.batch.attention_mask[rows]).logits[:, :-1].float()
                each = (logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * marks).sum(1)
                grads = torch.autograd.grad(each.mean(), list(parameters.values()))
            self._gradients.append(dict(zip(parameters, grads, strict=True)))
            logps.append(each.detach().double())
        model.train(was_training)
        self.logps.append(torch.cat(logps).view(-1, 2, len(numbers)))

    def _products(self, directions: dict[str, Tensor]) -> Tensor:
        """With each set's mean gradients, `[sets, 2]`."""
        products = [
            sum(
                float(torch.dot(grad[name].flatten().double(), part.flatten().double()))
                for name, part in directions.items()
            )
            for grad in self._gradients
        ]
        return torch.tensor(products, dtype=torch.float64).view(-1, 2)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before anything."""
        self._look(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Split the step to come, P as it is now."""
        parameters = trainable(kwargs["model"])
        self._before = {name: part.detach().clone() for name, part in parameters.items()}
        rule = find_update_rule(kwargs["optimizer"], parameters)
        zero = {name: torch.zeros_like(part) for name, part in parameters.items()}
        self._parts = (zero, zero) if isinstance(rule, str) else split_step(rule, parameters)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure both ends of the step."""
        step = {name: part.detach() - self._before[name] for name, part in trainable(kwargs["model"]).items()}
        first = [self._products(directions) for directions in (*self._parts, step)]
        self._look(kwargs["model"])
        self.along.append(torch.stack([*first, self._products(step)], -1))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """TRL's rewards."""
        if logs is not None and "rewards/chosen" in logs:
            self.rewards.append((float(logs["rewards/chosen"]) / BETA, float(logs["rewards/rejected"]) / BETA))


def split_step(rule: UpdateRule, parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The step that AdamW is about to take, by name: (momentum and decay, the gradient), P as it is before the step."""
    carried, fresh = {}, {}
    for number, (name, part) in enumerate(parameters.items()):
        terms, metric, momentum = rule.terms(number), rule.elements(number), rule.momentum(number)
        assert metric.second is not None and part.grad is not None
        scale = 1 / ((metric.second / metric.correction).sqrt() + metric.eps)
        is_new = metric.second == 0
        moment = torch.zeros_like(part) if momentum is None else momentum
        carried[name] = -terms.lr * (
            terms.carried * (scale * moment).masked_fill(is_new, 0) + terms.decoupled * part.detach()
        )
        fresh[name] = -terms.lr * torch.where(is_new, terms.limit * part.grad.sign(), terms.fresh * scale * part.grad)
    return carried, fresh


def leave_one_out(account: StepAttribution) -> tuple[Tensor, Tensor, Tensor]:
    """A step's estimate, its standard error, and its carried part, `[2]` each (chosen, rejected)."""
    moved, pairs = account.moved, len(account.pushes) // 2
    carried = (moved["momentum"] + moved["weight_decay"]).view(2, pairs)
    others = (moved["others_chosen"] + moved["others_rejected"]).view(2, pairs)
    each = others * pairs / (pairs - 1) + carried
    return each.mean(1), each.std(1) / math.sqrt(pairs), carried.mean(1)


def choose_rows(run: Run, data: list[Row], tokenizer: Any, seed: int) -> tuple[list[Row], dict[str, list[Row]]]:
    """Training rows and the held-out sets."""
    shuffled, by_prompt = random.Random(seed), defaultdict(list)
    for row in data:
        by_prompt[row["prompt"]].append(row)
    prompts = list(by_prompt)
    shuffled.shuffle(prompts)

    def one_each(names: list[str]) -> list[Row]:
        picked = (shuffled.sample(by_prompt[name], len(by_prompt[name])) for name in names)
        return [row for rows in picked if (row := next(filter(fits, rows), None)) is not None]

    def fits(row: Row) -> bool:
        try:
            to_batch(tokenizer, [row])
        except GradentError:  # cut to `LENGTH`, chosen and rejected are one
            return False
        return True

    others = one_each(prompts[: run.held_out * 5 // 4])[: run.held_out]
    rest = prompts[run.held_out * 5 // 4 :]
    if not run.prompts:
        rows = one_each(rest)[: run.pairs]
        return rows * run.copies, {"other": others}
    rest = rest[: run.prompts]
    same = one_each(rest)[: run.held_out]
    rows = [row for name in rest for row in by_prompt[name] if row not in same and fits(row)]
    shuffled.shuffle(rows)
    return rows[: run.pairs] * run.copies, {"other": others, "same": same}


def to_batch(tokenizer: Any, rows: list[Row], length: int = LENGTH) -> PairBatch:
    """Tokenized as TRL does."""
    columns = [[row[key] for row in rows] for key in ("prompt", "chosen", "rejected")]
    return PairBatch.from_text(tokenizer, *columns, max_length=length, add_eos=True)


def train(run: Run, folder: Path, data: list[Row], seed: int) -> tuple[EntanglementCallback, HeldOut]:
    """The callbacks of one run."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, sets = choose_rows(run, data, tokenizer, seed)
    members, start = {}, 0
    for name, part in sets.items():
        members[name] = list(range(start, start := start + len(part)))
    held_out = HeldOut(to_batch(tokenizer, [row for part in sets.values() for row in part]), members)
    callback = EntanglementCallback(every=1, alert=None, on_error="raise", mode=run.mode)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as out:
        DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=DPOConfig(
                output_dir=out, max_steps=run.steps, per_device_train_batch_size=run.batch, max_length=LENGTH,
                bf16=False, report_to="none", save_strategy="no", logging_steps=1, learning_rate=run.lr,
                weight_decay=0.01,
                disable_tqdm=True, use_cpu=True, gradient_checkpointing=False, seed=seed, beta=BETA,
                max_grad_norm=run.max_norm, dataloader_drop_last=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if run.lora else None,
            callbacks=[callback, held_out],
        ).train()  # fmt: skip
    return callback, held_out


def judge(callback: EntanglementCallback, held_out: HeldOut, part: str, place: int, steps: range) -> dict[str, float]:
    """The figures of some steps (counted from 1), a held-out set and a side."""
    number = list(held_out.members).index(part)
    estimates = [
        leave_one_out(record.attribution) for record in callback.records
        if record.attribution is not None and record.step in steps
    ]  # fmt: skip
    assert len(estimates) == len(steps)
    estimate, error, carried = (torch.stack(column)[:, place] for column in zip(*estimates, strict=True))
    along = torch.stack(held_out.along[steps.start - 1 : steps.stop - 1])[:, number, place].sum(0)
    logps = torch.stack(held_out.logps)[:, number, place]
    real = logps[steps.stop - 1] - logps[steps.start - 1]
    found = {
        "steps": len(steps), "estimate": float(estimate.sum()), "estimate_error": float(error.square().sum().sqrt()),
        "first_order": float(along[2]), "both_ends": float(along[2:].mean()), "real": float(real.mean()),
        "real_error": float(real.std() / math.sqrt(len(real))), "carried": float(carried.sum()),
        "carried_held_out": float(along[0]),
    }  # fmt: skip
    found["z"] = (found["estimate"] - found["real"]) / math.hypot(found["estimate_error"], found["real_error"])
    last = range(max(steps.start, steps.stop - 10), steps.stop)
    rewards = torch.tensor([held_out.rewards[step - 1][place] for step in last], dtype=torch.float64)
    levels = torch.stack([(logps[step - 1] - logps[0]).mean() for step in last])
    return found | {
        "rewards": float(rewards.mean()), "rewards_error": float(rewards.std() / math.sqrt(len(last))),
        "level": float(levels.mean()),
    }  # fmt: skip


def summarize() -> None:
    """Print the share of rows whose z is small, by run and part, from the results."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    with (RESULTS / "unseen.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            part = f"2 to {EARLY}" if int(row["from"]) <= EARLY else f"from {row['from']}"
            found[row["run"], row["held_out"], part].append(abs(float(row["z"])))
    table = Table("run", "held out", "steps", "rows", "within 1", "within 2", "largest z")
    for key, z in found.items():
        within = [str(sum(value <= most for value in z)) for most in (1, 2)]
        table.add_row(*key, str(len(z)), *within, f"{max(z):.1f}")
    Console(width=180).print(table)


def main(
    data: Annotated[Path | None, typer.Option(help="JSON lines of preference rows.")] = None,
    models: Annotated[Path | None, typer.Option(help="Folder of models.")] = None,
    only: Annotated[str, typer.Option(help="Runs, by name, with commas; all by default.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of each run, with commas.")] = "0,1",
    save: Annotated[bool, typer.Option(help="Append to the results.")] = True,
    keep: Annotated[Path | None, typer.Option(help="A folder for every step's figures.")] = None,
    summary: Annotated[bool, typer.Option(help="Print what the results come to, and train nothing.")] = False,
) -> None:
    """Train every run, print the table, append it to the results."""
    if summary:
        summarize()
        return
    if data is None or models is None:
        raise typer.BadParameter("--data and --models are needed, but for --summary.")
    rows: list[Row] = [json.loads(line) for line in data.read_text().splitlines()]
    columns = ("estimate", "estimate_error", "first_order", "both_ends", "real", "real_error", "z", "carried",
               "carried_held_out", "rewards", "rewards_error", "level")  # fmt: skip
    table = Table("run", "seed", "steps", "held out", "side", *columns)
    for name in only.split(",") if only else RUNS:
        run = RUNS[name]
        for seed in map(int, seeds.split(",")):
            callback, held_out = train(run, models / run.model, rows, seed)
            if keep is not None:
                accounts = [(record.step, record.attribution) for record in callback.records]
                torch.save({"accounts": accounts, **vars(held_out)}, keep / f"{name}, {seed}.pt")
            for start, stop in itertools.pairwise([2, *(cut + 1 for cut in run.cuts), run.steps + 1]):
                for part, place in itertools.product(held_out.members, (0, 1)):
                    found = judge(callback, held_out, part, place, range(start, stop))
                    where = [f"{start} to {stop - 1}", part, SIDES[place]]
                    table.add_row(name, str(seed), *where, *(f"{found[key]:.3f}" for key in columns))
                    print(name, seed, *where, {key: round(value, 4) for key, value in found.items()}, flush=True)
                    if save:
                        append(
                            "unseen",
                            {"run": name, "seed": seed, "from": start, "held_out": part, "side": SIDES[place], **found},
                        )
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
