"""Where the comparisons of Figures 1, 2, 5 and 6 start: a model, pairs to train on, held-out pairs.

Full scale: a model of the hub under LoRA, without SFT (C.2), and OpenAI's comparisons of TL;DR summaries. For `--small`
the demo stands in. Summaries of one text differ in length and wording; here one prompt is answered in three of the
demo's styles, and chosen and rejected each have one of them at random, so their lengths differ in two pairs of three.
The model is fine-tuned on such answers first, since it knows nothing before.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from examples.paper.settings import Lora, Settings, shown_name
from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.statements import Statement
from gradent.demo.task import STYLES, TokenPair, make_task, prompt_of, responses_of
from gradent.demo.train import train_sft
from gradent.errors import GradentWarning, InputError, PairError
from gradent.pairs.batch import PairBatch
from gradent.pairs.tokenize import tokenize_pair

__all__ = ["ARCHITECTURES", "Example", "Start", "load_examples", "load_pretrained", "load_start", "make_start"]

ASKED = "prefix+suffix"
ANSWERED = tuple(style for style in STYLES if style != "single token")


@dataclass(frozen=True)
class Example:
    """One comparison, as text."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class Start:
    """Model and pairs.

    Attributes:
        name: of the model.
        seed: of everything.
        tokenizer: the model's.
        build: makes the policy at its start, the same one at every call.
        own_reference: whether the reference is a second model; with LoRA it is the policy without its adapter.
        train: comparisons to train on.
        probe: held-out ones.
        max_length: tokens of prompt and response, at most; None for any number.
    """

    name: str
    seed: int
    tokenizer: Any
    build: Callable[[], Any]
    own_reference: bool
    train: tuple[Example, ...]
    probe: tuple[Example, ...]
    max_length: int | None = None

    @cached_property
    def pairs(self) -> list[TokenPair]:
        """Token ids of `train`."""
        return self._tokenize(self.train)

    @cached_property
    def held_out(self) -> list[TokenPair]:
        """Token ids of `probe`."""
        return self._tokenize(self.probe)

    @property
    def longest(self) -> int:
        """Tokens of the longest row of `train`."""
        return max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in self.pairs)

    def _tokenize(self, examples: Iterable[Example]) -> list[TokenPair]:
        return [
            tokenize_pair(
                self.tokenizer, each.prompt, each.chosen, each.rejected, max_length=self.max_length,
                where=f"comparison {number}",
            )
            for number, each in enumerate(examples)
        ]  # fmt: skip


def _tiny_gpt2(vocabulary: int, seed: int) -> Any:
    """As large as the demo's Llama: 2 layers of width 96."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=96, n_layer=2, n_head=4, initializer_range=0.08,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


ARCHITECTURES: dict[str, Callable[[int, int], Any]] = {"llama": build_model, "gpt2": _tiny_gpt2}
"""Name to what builds a small model with random weights from a vocabulary and a seed."""


def make_start(settings: Settings, architecture: str, seed: int) -> Start:
    """The small stand-in for TL;DR.

    Args:
        settings: how much.
        architecture: a key of `ARCHITECTURES`.
        seed: of statements, weights and SFT.

    Returns:
        The start, after SFT.
    """
    demo, tokenizer = settings.demo, build_tokenizer()
    model = ARCHITECTURES[architecture](len(tokenizer), seed)
    task = make_task(seed=seed, train=settings.train, probe=settings.probe, answers=12 * settings.train)
    single = prompt_of(Statement("", True), "single token")
    answers = tuple(
        (prompt_of(task.train[number % settings.train], ASKED), answer)
        for number, (prompt, answer) in enumerate(task.sft)
        if not prompt.endswith(single)
    )
    train_sft(model, tokenizer, replace(task, sft=answers), demo, seed=seed, advance=lambda step: None)
    rng = random.Random(seed)

    def compare(statement: Statement) -> Example:
        chosen, _ = responses_of(statement, rng.choice(ANSWERED), task.label_words)
        _, rejected = responses_of(statement, rng.choice(ANSWERED), task.label_words)
        return Example(prompt_of(statement, ASKED), chosen, rejected)

    return Start(
        name=f"{architecture}, {sum(each.numel() for each in model.parameters()):,} parameters", seed=seed,
        tokenizer=tokenizer, build=lambda: copy.deepcopy(model), own_reference=True,
        train=tuple(map(compare, task.train)), probe=tuple(map(compare, task.probe)),
    )  # fmt: skip


def load_pretrained(name: str, *, bf16: bool = False) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        name: hub id, or a directory of `save_pretrained`.
        bf16: load in bfloat16, else in float32.

    Returns:
        `(model, tokenizer)`, the model on a GPU where there is one.

    Raises:
        InputError: there are several GPUs, over which trainers would spread the batches.
    """
    if torch.cuda.device_count() > 1:
        raise InputError(
            f"{torch.cuda.device_count()} GPUs are visible, and this example is written for one: set "
            "CUDA_VISIBLE_DEVICES=0."
        )
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if bf16 else torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def load_start(settings: Settings, model: str, seed: int, pairs: Path | None = None) -> Start:
    """A model of the hub or a directory, with pairs of the hub or a file.

    Args:
        settings: how much.
        model: hub id or directory.
        seed: of the choice of pairs, and of the adapter's weights.
        pairs: JSONL with `prompt`, `chosen` and `rejected`; None for the hub's `settings.comparisons`.

    Returns:
        The start.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    positions = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
    longest = min((each for each in (settings.max_length, positions) if each), default=None)

    def build() -> Any:
        policy, _ = load_pretrained(model, bf16=settings.bf16)
        return policy if settings.lora is None else _with_lora(policy, settings.lora, seed)

    train, probe = (_usable(tokenizer, each, longest) for each in load_examples(settings, seed, pairs))
    return Start(
        name=shown_name(model), seed=seed, tokenizer=tokenizer, build=build, own_reference=settings.lora is None,
        train=train, probe=probe, max_length=longest,
    )  # fmt: skip


def _usable(tokenizer: Any, examples: Sequence[Example], max_length: int | None) -> tuple[Example, ...]:
    """Those of which something is left that tells the two responses apart, once cut to `max_length`."""
    kept, why = [], ""
    for each in examples:
        try:
            texts = (each.prompt, each.chosen, each.rejected)
            PairBatch.from_tokens([tokenize_pair(tokenizer, *texts, max_length=max_length)])
        except PairError as error:
            why = str(error)
        else:
            kept.append(each)
    if not kept:
        raise InputError(f"None of {len(examples)} comparisons can be used; the last one: {why}")
    if len(kept) < len(examples):
        warnings.warn(
            f"{len(examples) - len(kept)} of {len(examples)} comparisons are left out; the last one: {why}",
            GradentWarning, stacklevel=2,
        )  # fmt: skip
    return tuple(kept)


def _with_lora(model: Any, lora: Lora, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(
            model,
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM"),
        )


def load_examples(settings: Settings, seed: int, path: Path | None) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Comparisons to train on, and others to hold out: the hub's test split, or a quarter of the file at most.

    Args:
        settings: how many.
        seed: of the choice.
        path: JSONL; None for the hub's `settings.comparisons`.

    Returns:
        `(train, probe)`.

    Raises:
        InputError: there is no source, a column is missing, or there are too few rows.
    """
    if path is not None:
        rows = load_dataset("json", data_files=str(path), split="train")
    elif settings.comparisons is not None:
        rows = load_dataset(settings.comparisons, split="train")
    else:
        raise InputError(
            "With --small, --model needs --pairs FILE (JSONL with prompt, chosen, rejected): the generated statements "
            "are for the demo's own model, which has their words and is fine-tuned on them."
        )
    lacking = {"prompt", "chosen", "rejected"} - set(rows.column_names)
    if lacking:
        raise InputError(
            f"{path or settings.comparisons}: no column {', '.join(sorted(lacking))}; accepted are rows with prompt, "
            f"chosen and rejected. It has {', '.join(rows.column_names)}."
        )
    rows = rows.filter(lambda row: row["chosen"].strip() != row["rejected"].strip()).shuffle(seed=seed)
    if path is None:
        train, probe = rows, load_dataset(settings.comparisons, split="test").shuffle(seed=seed)
        probe = probe.filter(lambda row: row["chosen"].strip() != row["rejected"].strip())
    else:
        held = min(settings.probe, len(rows) // 4)
        train, probe = rows.select(range(held, len(rows))), rows.select(range(held))
    if not len(train) or not len(probe):
        raise InputError(f"{path}: {len(rows)} usable rows; at least 4 are needed, a quarter of them held out.")
    return tuple(_take(train, settings.train)), tuple(_take(probe, settings.probe))


def _take(rows: Any, count: int) -> Iterable[Example]:
    for row in rows.select(range(min(count, len(rows)))):
        chosen, rejected = (text if text[:1].isspace() else " " + text for text in (row["chosen"], row["rejected"]))
        yield Example(row["prompt"].rstrip(), chosen, rejected)
