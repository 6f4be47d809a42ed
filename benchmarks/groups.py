"""What the callback costs in GRPO: TRL's GRPOTrainer with every second step measured, generation left out.

    python -m benchmarks.groups

One run for each of LoRA (r=16 on every linear layer) and full parameters: the Llama of `benchmarks.callback`, two
groups of four drawn rollouts a step, 128 tokens of prompt and 64 to 128 of response, float32, AdamW. Measured and
unmeasured steps alternate; the ratio is of their medians. Appends a line a run to benchmarks/results/groups.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from trl import GRPOConfig, GRPOTrainer

from benchmarks.append import append
from benchmarks.callback import Stopwatch, make_model, make_tokenizer
from gradent import EntanglementCallback

WORDS, PROMPT, LONGEST = 8192, 128, 128
BOUNDS = {"LoRA": 1.10, "full": 1.30}
"""Most that a measured step is to cost."""


class Drawn(GRPOTrainer):  # type: ignore[misc]
    """GRPO whose rollouts are drawn by a seed; `idle` is the time that is not of training, in seconds."""

    idle = 0.0

    def _generate_single_turn(self, prompt_ids: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        draws = self.__dict__.setdefault("draws", random.Random(0))
        return [[draws.randrange(2, WORDS) for _ in range(draws.randint(64, LONGEST))] for _ in prompt_ids], None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        since = time.perf_counter()
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.idle += time.perf_counter() - since


class Training(Stopwatch):
    """Seconds of each optimizer step, without what is not of training."""

    trainer: Drawn

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.trainer.idle = 0.0
        super().on_step_begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        super().on_step_end()
        self.seconds[-1] -= self.trainer.idle


def even(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A reward that differs within groups.

    Args:
        completion_ids: of each rollout.

    Returns:
        The share of even ids.
    """
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def run(kind: str, steps: int, out: str, *, checkpointing: bool) -> tuple[float, float]:
    """Median seconds of a measured and of an unmeasured step.

    Args:
        kind: "LoRA" or "full".
        steps: optimizer steps.
        out: the trainer's output directory.
        checkpointing: gradient checkpointing, TRL's default.

    Returns:
        `(measured, unmeasured)`.
    """
    torch.manual_seed(0)
    model = make_model(WORDS, PROMPT + LONGEST)
    draws, watch = random.Random(1), Training()
    prompts = [" ".join(f"w{draws.randrange(WORDS - 2)}" for _ in range(PROMPT)) for _ in range(2 * steps)]
    watch.trainer = trainer = Drawn(
        model=model, reward_funcs=even, train_dataset=Dataset.from_dict({"prompt": prompts}),
        args=GRPOConfig(
            output_dir=out, max_steps=steps, per_device_train_batch_size=8, num_generations=4, beta=0.0, bf16=False,
            max_completion_length=LONGEST, learning_rate=1e-6, report_to="none", save_strategy="no",
            logging_steps=steps, gradient_checkpointing=checkpointing, disable_tqdm=True, use_cpu=True,
        ),
        processing_class=make_tokenizer(WORDS),
        peft_config=LoraConfig(r=16, target_modules="all-linear") if kind == "LoRA" else None,
        callbacks=[EntanglementCallback(every=2, on_error="raise", alert=None), watch],
    )  # fmt: skip
    trainer.train()
    seconds = watch.seconds[3:]  # the first steps warm up; step 1 is measured too
    return statistics.median(seconds[::2]), statistics.median(seconds[1::2])


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run, even.")] = 24,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = False,
) -> None:
    """Run both, print the ratios, append them to the results."""
    torch.set_num_threads(threads)
    table = Table("run", "unmeasured (s)", "measured (s)", "ratio", "bound")
    for kind, bound in BOUNDS.items():
        with tempfile.TemporaryDirectory() as out:
            measured, plain = run(kind, steps, out, checkpointing=checkpointing)
        ratio = measured / plain
        table.add_row(kind, f"{plain:.3f}", f"{measured:.3f}", f"{ratio:.3f}", f"{bound}")
        row = {"run": kind, "steps": steps, "threads": threads, "checkpointing": checkpointing}
        append("groups", {**row, "unmeasured_s": plain, "measured_s": measured, "ratio": ratio})
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
