"""What a cure costs: a step of each of gradent's trainers against a step of TRL's DPOTrainer.

    python -m benchmarks.cures

One run each for LoRA (r=16 on every linear layer) and for full parameters, with and without gradient checkpointing: a
Llama of 4 layers and width 256 with random weights, 4 pairs of 128 tokens a step, float32. Steps of the trainers
alternate on equal models and equal batches, so that all see the machine in the same mood; the ratio is of the medians.
Time is the process's CPU time (`time.process_time`), not the wall's: the machine is shared, and with one thread the two
are the same where nobody else is at work. Memory is the peak of the process's resident set in one step of each trainer,
each in a process of its own, above what it holds before the step. Appends a line a cure and run to
benchmarks/results/cures.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Annotated, Any

import psutil
import torch
import typer
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from benchmarks.append import append
from benchmarks.callback import make_data, make_tokenizer
from gradent.trainer.adaptive_nll.config import AdaptiveNLLDPOConfig
from gradent.trainer.adaptive_nll.trainer import AdaptiveNLLDPOTrainer
from gradent.trainer.pairwise.config import PairwiseNormalizedDPOConfig
from gradent.trainer.pairwise.trainer import PairwiseNormalizedDPOTrainer
from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
from gradent.trainer.token_masking.trainer import TokenMaskedDPOTrainer

TOKENS, PAIRS, WORDS = 128, 4, 4096
BOUND = 2.0
"""Most that a step may cost, in steps of DPO."""
TRAINERS: dict[str, tuple[Any, Any]] = {
    "DPO": (DPOTrainer, DPOConfig),
    "pairwise": (PairwiseNormalizedDPOTrainer, PairwiseNormalizedDPOConfig),
    "masked": (TokenMaskedDPOTrainer, TokenMaskedDPOConfig),
    "adaptive": (AdaptiveNLLDPOTrainer, AdaptiveNLLDPOConfig),
}


def make(cure: str, kind: str, checkpointing: bool, out: str) -> Any:
    """A trainer of `TRAINERS` over the same model and data, whichever it is."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    trainer, config = TRAINERS[cure]
    return trainer(
        model=model,
        ref_model=copy.deepcopy(model) if kind == "full" else None,
        args=config(
            output_dir=out, per_device_train_batch_size=PAIRS, max_length=2 * TOKENS, bf16=False, report_to="none",
            activation_checkpointing=checkpointing, disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=make_data(PAIRS, WORDS),
        processing_class=make_tokenizer(WORDS),
        peft_config=LoraConfig(r=16, target_modules="all-linear") if kind == "LoRA" else None,
    )  # fmt: skip


class Steps:
    """A trainer's forward, backward and step of the optimizer on one batch, again and again."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        if trainer.args.activation_checkpointing:  # as `train` does
            trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        trainer.callback_handler.optimizer = trainer.optimizer
        self._tell("on_train_begin")
        self.seconds: list[float] = []

    def _tell(self, event: str) -> None:
        """Let the trainer's callbacks know, as `train` does: a cure may be one."""
        trainer = self._trainer
        getattr(trainer.callback_handler, event)(trainer.args, trainer.state, trainer.control)

    def take(self) -> None:
        """One step, timed."""
        since = time.process_time()
        self._tell("on_step_begin")
        self._trainer.training_step(self._trainer.model, dict(self._batch))
        self._tell("on_pre_optimizer_step")
        self._trainer.optimizer.step()
        self._tell("on_optimizer_step")
        self._trainer.optimizer.zero_grad()
        self._trainer.state.global_step += 1
        self._tell("on_step_end")
        self.seconds.append(time.process_time() - since)


def peak(cure: str, kind: str, checkpointing: bool) -> float:
    """MB that a step takes at most above what is held before it (weights, optimizer's state)."""
    with tempfile.TemporaryDirectory() as out:
        steps = Steps(make(cure, kind, checkpointing, out))
        steps.take()
        me, highest, over = psutil.Process(), 0, threading.Event()

        def watch() -> None:
            nonlocal highest
            while not over.is_set():
                highest = max(highest, me.memory_info().rss)
                time.sleep(0.001)

        before = me.memory_info().rss
        thread = threading.Thread(target=watch)
        thread.start()
        for _ in range(3):
            steps.take()
        over.set()
        thread.join()
    return (highest - before) / 2**20


def peak_elsewhere(cure: str, kind: str, checkpointing: bool) -> float:
    """`peak` in a fresh process, whose allocator has seen nothing else."""
    code = "from benchmarks.cures import *; torch.set_num_threads(1); "
    code += f"print(peak({cure!r}, {kind!r}, {checkpointing}))"
    # Freed memory goes back at once, so that what one step took is not there for the next.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main(
    steps: Annotated[int, typer.Option(help="Steps of each trainer.")] = 24,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Run all, print the ratios, append them to the results."""
    torch.set_num_threads(threads)
    table = Table("cure", "run", "checkpointing", "DPO (s)", "cure (s)", "ratio", "bound", "DPO (MB)", "cure (MB)")
    for kind in ("LoRA", "full"):
        for checkpointing in (False, True):
            with tempfile.TemporaryDirectory() as out:
                every = {name: Steps(make(name, kind, checkpointing, out)) for name in TRAINERS}
                for _ in range(steps + 3):
                    for one in every.values():
                        one.take()
            medians = {name: statistics.median(one.seconds[3:]) for name, one in every.items()}  # the first warm up
            memory = {name: peak_elsewhere(name, kind, checkpointing) for name in TRAINERS}
            for cure in (name for name in TRAINERS if name != "DPO"):
                ratio = medians[cure] / medians["DPO"]
                seconds = [f"{value:.3f}" for value in (medians["DPO"], medians[cure], ratio, BOUND)]
                table.add_row(cure, kind, str(checkpointing), *seconds, f"{memory['DPO']:.0f}", f"{memory[cure]:.0f}")
                append(
                    "cures",
                    {
                        "cure": cure, "run": kind, "checkpointing": checkpointing, "steps": steps, "threads": threads,
                        "tokens": TOKENS, "pairs": PAIRS, "dpo_s": medians["DPO"], "cure_s": medians[cure],
                        "ratio": ratio, "dpo_mb": memory["DPO"], "cure_mb": memory[cure],
                    },
                )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
