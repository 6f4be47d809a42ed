"""What the callback costs: TRL's DPOTrainer with every second step measured, against the steps between them.

    python -m benchmarks.callback

One run for each of LoRA (r=16 on every linear layer), full parameters, and full parameters whose gradient comes out of
the measured products (`weight_grad="shared"`): a Llama of 8 layers and width 512 with random weights, 2 pairs of 256
tokens a step, float32. Measured and unmeasured steps alternate, so that both see the machine in the same mood; the
ratio is of their medians. `every=10` is computed from it, since nine of ten steps are untouched.
Appends a line a run to benchmarks/results/callback.csv, and shows where the time goes with `--profile`.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import cProfile
import pstats
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.append import append
from gradent import EntanglementCallback
from gradent.recorder import WeightGrad

TOKENS, PAIRS = 256, 2
BOUNDS: dict[str, tuple[float, float]] = {"LoRA": (1.08, 1.01), "full": (1.30, 1.03), "full, shared": (1.08, 1.01)}
"""Most that a measured step is to cost, and a step on average with `every=10`; with the account, but for shared."""


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self._since = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self._since)


def make_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """One token a word, `w0` to `w<words - 1>`."""
    vocab = {word: index for index, word in enumerate(["<pad>", "<eos>", *(f"w{n}" for n in range(words - 2))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def make_model(words: int, positions: int) -> LlamaForCausalLM:
    """A Llama of 8 layers and width 512 with random weights, for so many words and positions."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            max_position_embeddings=positions, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def make_data(rows: int, words: int) -> Dataset:
    """Pairs whose rows have `TOKENS` tokens, half of them prompt."""
    draw = torch.Generator().manual_seed(0)

    def text(count: int) -> str:
        return " ".join(f"w{n}" for n in torch.randint(0, words - 2, (count,), generator=draw).tolist())

    half = TOKENS // 2
    return Dataset.from_list(
        [{"prompt": text(half), "chosen": " " + text(half - 1), "rejected": " " + text(half - 1)} for _ in range(rows)]
    )


def run(
    kind: str, steps: int, out: str, *, checkpointing: bool, profile: bool, weight_grad: WeightGrad | None = None
) -> tuple[float, float]:
    """Median seconds of a measured and of an unmeasured step.

    Args:
        kind: "LoRA" or "full".
        steps: optimizer steps.
        out: the trainer's output directory.
        checkpointing: gradient checkpointing, TRL's default.
        profile: print a profile of the measured run.
        weight_grad: as the callback takes it.

    Returns:
        `(measured, unmeasured)`.
    """
    torch.manual_seed(0)
    words = 8192
    model = make_model(words, TOKENS)
    watch = Stopwatch()
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model) if kind == "full" else None,
        args=DPOConfig(
            output_dir=out, max_steps=steps, per_device_train_batch_size=PAIRS, max_length=TOKENS, bf16=False,
            report_to="none", save_strategy="no", logging_steps=steps, gradient_checkpointing=checkpointing,
            disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=make_data(PAIRS * steps, words),
        processing_class=make_tokenizer(words),
        peft_config=LoraConfig(r=16, target_modules="all-linear") if kind == "LoRA" else None,
        callbacks=[EntanglementCallback(every=2, on_error="raise", alert=None, weight_grad=weight_grad), watch],
    )  # fmt: skip
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    trainer.train()
    profiler.disable()
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    seconds = watch.seconds[3:]  # the first steps warm up; step 1 is measured too
    return statistics.median(seconds[::2]), statistics.median(seconds[1::2])


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run, even.")] = 24,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = False,
    kind: Annotated[str, typer.Option(help='LoRA, full, "full, shared" or all.')] = "all",
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes.")] = False,
) -> None:
    """Run both, print the ratios, append them to the results."""
    import tempfile  # noqa: PLC0415

    torch.set_num_threads(threads)
    table = Table("run", "unmeasured (s)", "measured (s)", "ratio", "bound", "every=10", "bound")
    for name in BOUNDS if kind == "all" else [kind]:
        with tempfile.TemporaryDirectory() as out:
            measured, plain = run(
                name.partition(",")[0], steps, out, checkpointing=checkpointing, profile=profile,
                weight_grad="shared" if name.endswith("shared") else None,
            )  # fmt: skip
        ratio = measured / plain
        tenth = 0.9 + 0.1 * ratio
        every, ten = BOUNDS[name]
        table.add_row(name, f"{plain:.3f}", f"{measured:.3f}", f"{ratio:.3f}", f"{every}", f"{tenth:.3f}", f"{ten}")
        append(
            "callback",
            {
                "run": name, "steps": steps, "threads": threads, "tokens": TOKENS, "pairs": PAIRS,
                "checkpointing": checkpointing, "unmeasured_s": plain, "measured_s": measured, "ratio": ratio,
                "ratio_every_10": tenth,
            },
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
