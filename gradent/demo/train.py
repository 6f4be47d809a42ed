"""SFT and DPO with TRL's own trainers, and the callback that measures the probe pairs every few steps of DPO."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from gradent.demo.settings import DemoSettings
from gradent.demo.task import Task, TokenPair, text_rows, tokenize_style
from gradent.measurement import measure
from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch

__all__ = [
    "Measured", "PairCollator", "SplitCollator", "one_thread", "padded", "pair_rows", "sft_row", "train_dpo",
    "train_quietly", "train_sft", "trainer_arguments",
]  # fmt: skip

Advance = Callable[[int], None]
"""Told the number of steps done so far."""


@dataclass(frozen=True)
class Measured:
    """The Gram entries of the probe pairs after some step of DPO."""

    step: int
    gram: PairGram


def train_sft(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, settings: DemoSettings, *, seed: int, advance: Advance
) -> None:
    """Fine-tune a model on the task's answers, the loss on the answers alone."""
    trained = copy.deepcopy(model)  # TRL replaces the forward of the model that it is given
    with trainer_arguments(seed) as common:
        trainer = SFTTrainer(
            model=trained,
            args=SFTConfig(
                **common, max_steps=settings.sft_steps, per_device_train_batch_size=settings.sft_batch,
                learning_rate=settings.sft_lr, warmup_steps=settings.sft_steps // 20, completion_only_loss=True,
                max_length=None,
            ),
            train_dataset=datasets.Dataset.from_list([sft_row(tokenizer, *texts) for texts in task.sft]),
            processing_class=padded(tokenizer), callbacks=[_Progress(advance)],
        )  # fmt: skip
        train_quietly(trainer)
    model.load_state_dict(trained.state_dict())


def train_dpo(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, style: str, settings: DemoSettings, *, seed: int,
    advance: Advance,
) -> list[Measured]:  # fmt: skip
    """Run TRL's DPOTrainer on one style's pairs, and measure the probe pairs on the way."""
    pairs = tokenize_style(tokenizer, task.train, style, task.label_words)
    probe = PairBatch.from_tokens(tokenize_style(tokenizer, task.probe, style, task.label_words))
    watch = _Watch(probe, settings.measure_every, advance)
    with trainer_arguments(seed) as common:
        trainer = DPOTrainer(
            model=copy.deepcopy(model), ref_model=copy.deepcopy(model),
            args=DPOConfig(
                **common, beta=settings.beta, max_steps=settings.dpo_steps,
                per_device_train_batch_size=settings.dpo_batch, learning_rate=settings.dpo_lr,
                lr_scheduler_type="constant", optim=settings.dpo_optimizer, max_grad_norm=0.0, weight_decay=0.0,
                max_length=None, remove_unused_columns=False,
            ),
            data_collator=PairCollator(pairs), train_dataset=pair_rows(task, style),
            processing_class=padded(tokenizer), callbacks=[watch],
        )  # fmt: skip
        train_quietly(trainer)
    return watch.measured


class _Progress(TrainerCallback):
    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(state.global_step)


class _Watch(TrainerCallback):
    """Measures the probe pairs between steps; `measure` leaves the model and the random state as they were."""

    def __init__(self, probe: PairBatch, every: int, advance: Advance) -> None:
        self.measured: list[Measured] = []
        self._probe, self._every, self._advance = probe, every, advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self._every == 0 or step == state.max_steps:
            self._measure(kwargs["model"], step)
        self._advance(step)

    def _measure(self, model: Any, step: int) -> None:
        self.measured.append(Measured(step, measure(model, self._probe)))


class PairCollator:
    """Batches of gradent's own token ids in TRL's layout, without the EOS that TRL's tokenization appends."""

    def __init__(self, pairs: Sequence[TokenPair]) -> None:
        self._pairs = pairs

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of B pairs."""
        batch = PairBatch.from_tokens([self._pairs[row["pair"]] for row in rows])
        return {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "completion_mask")}


class SplitCollator(PairCollator):
    """The same batches as TRL's `CPOTrainer` takes them: chosen and rejected apart, with labels."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of B pairs."""
        both = super().__call__(rows)
        both["labels"] = both["input_ids"].masked_fill(both.pop("completion_mask") == 0, -100)
        return {
            f"{side}_{name}": part
            for name, rows in both.items()
            for side, part in zip(("chosen", "rejected"), rows.chunk(2), strict=True)
        }


def sft_row(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> dict[str, list[int]]:
    """An answer as SFT sees it, EOS behind it."""
    prompt_ids = list(tokenizer(prompt)["input_ids"])
    ids = [*list(tokenizer(prompt + answer)["input_ids"]), tokenizer.eos_token_id]
    marks = [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids))
    return {"input_ids": ids, "completion_mask": marks}


def pair_rows(task: Task, style: str) -> Any:
    """The pairs of the training statements, as TRL's dataset."""
    rows = text_rows(task.train, style, task.label_words)
    return datasets.Dataset.from_list([{"pair": number, **row} for number, row in enumerate(rows)])


def padded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy with a pad token: trainers set one on the tokenizer that they are given."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: as fast for a model this small, far faster on a busy machine, and the same sums on any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def trainer_arguments(seed: int) -> Iterator[dict[str, Any]]:
    """Arguments of every run: float32, nothing saved, nothing reported, nothing printed."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            # TRL's defaults still use names that transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            yield {
                "output_dir": folder, "seed": seed, "bf16": False, "gradient_checkpointing": False,
                "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
                "use_cpu": torch.cuda.device_count() != 1,
            }  # fmt: skip
    finally:
        if shown:
            datasets.enable_progress_bars()


def train_quietly(trainer: Any) -> None:
    """Train without a printed line."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
