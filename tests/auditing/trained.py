"""A run as TRL leaves it behind: a tiny Llama, trained by DPOTrainer on the CPU for a few steps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tests.auditing.made import write_jsonl
from tests.shared import folder_once

WORDS = "the film soup book was felt truly quite a quiet joy loud bore warm cold dull bright good bad . !".split()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Where a run's files are: the model before training, the run, and the pairs it was trained on."""

    base: Path
    run: Path
    pairs: Path


def train_run(
    directory: Path, *, callbacks: Sequence[TrainerCallback] = (), resume: int | None = None, **options: Any
) -> Trained:
    """`train_anew`, but that a run of the same options is trained once a session, and copied from then on."""
    if callbacks or resume is not None or (directory.exists() and any(directory.iterdir())):
        return train_anew(directory, callbacks=callbacks, resume=resume, **options)
    first = folder_once(("train_run", sorted(options.items())), lambda folder: train_anew(folder, **options))
    shutil.copytree(first, directory, dirs_exist_ok=True)
    for path in directory.rglob("*"):
        if path.name == "training_args.bin":
            arguments = torch.load(path, weights_only=False)
            arguments.output_dir = str(directory / "run")
            torch.save(arguments, path)
        elif path.suffix in (".json", ".md"):
            path.write_text(path.read_text("utf-8").replace(str(first), str(directory)), "utf-8")
    return Trained(base=directory / "base", run=directory / "run", pairs=directory / "pairs.jsonl")


def train_anew(
    directory: Path,
    *,
    lora: bool,
    steps: int = 6,
    save_steps: int = 2,
    data_rows: int = 16,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    callbacks: Sequence[TrainerCallback] = (),
    save_model: bool = False,
    resume: int | None = None,
    seed: int = 0,
    **config: Any,
) -> Trained:
    """Train `directory/base` on `directory/pairs.jsonl` into `directory/run`; what is there already is used again.

    Args:
        directory: where everything goes; made where needed.
        lora: train a LoRA adapter; all parameters otherwise.
        steps: steps of the optimizer.
        save_steps: a checkpoint every so many steps, and after the last.
        data_rows: pairs in the data; a fourth of them, at most 8, are evaluated whenever a checkpoint is saved.
        batch_size: pairs a step.
        learning_rate: of the optimizer.
        callbacks: the trainer's, beside its own.
        save_model: in the end write the weights and the trainer's state into the run's own directory as well.
        resume: go on from the checkpoint of this step.
        seed: of the data's order and of the adapter's first values.
        config: further fields of `DPOConfig`.

    Returns:
        The paths.
    """
    made = Trained(base=directory / "base", run=directory / "run", pairs=directory / "pairs.jsonl")
    if not made.base.is_dir():
        make_base(made.base)
    rows = word_pairs(data_rows)
    write_jsonl(made.pairs, rows)
    arguments = DPOConfig(
        output_dir=str(made.run), max_steps=steps, save_steps=save_steps, eval_steps=save_steps, eval_strategy="steps",
        per_device_train_batch_size=batch_size, logging_steps=1, learning_rate=learning_rate, seed=seed,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, **config,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(made.base),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[: min(8, max(1, data_rows // 4))]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(made.base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(made.run / f"checkpoint-{resume}"))
    if save_model:
        trainer.save_model()
        trainer.save_state()
    return made


def make_base(path: Path) -> Path:
    """A Llama of 2 layers and width 16 with random weights, and its tokenizer of one token a word."""
    vocab = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def word_pairs(count: int) -> list[dict[str, str]]:
    """Pairs in the words that `make_base`'s tokenizer knows; the responses end alike, so their gradients overlap."""
    things, ends = ("film", "soup", "book"), ("truly good .", "quite warm .", "a quiet joy !")
    return [
        {
            "prompt": f"the {things[number % 3]} was",
            "chosen": f" bright {ends[number % 5 % 3]}",
            "rejected": f" dull {ends[number % 5 % 3]}",
        }
        for number in range(count)
    ]
