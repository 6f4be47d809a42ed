"""Where all methods start from: a model after SFT, and a seed's pairs. On generated statements, or on a file's."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cures_parts.plan import Plan
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.statements import Statement, read_statements
from gradent.demo.task import Task, find_label_words, make_task, word_list
from gradent.demo.train import train_sft

__all__ = ["Generated", "Start", "Tweets"]

_RARE = 3
"""A word of the file that occurs less often is unknown to the demo's model."""


@dataclass(frozen=True)
class Start:
    """The model after SFT, its tokenizer, and the statements of a seed."""

    model: Any
    tokenizer: Any
    task: Task


class Generated:
    """The demo's model and statements: weights, statements and SFT of every seed's own.

    Args:
        plan: how much.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def start(self, seed: int) -> Start:
        """Fine-tune.

        Args:
            seed: of everything.

        Returns:
            Where a seed's runs start from.
        """
        plan, tokenizer = self._plan, build_tokenizer()
        model = build_model(len(tokenizer), seed)
        task = make_task(seed=seed, train=plan.sft.train, probe=plan.probe, answers=12 * plan.sft.train)
        train_sft(model, tokenizer, task, plan.sft, seed=seed, advance=lambda step: None)
        return Start(model, tokenizer, replace(task, train=task.train[: plan.steps * plan.batch]))


class Tweets:
    """Statements from a file, and a model that is fine-tuned once; a seed draws its pairs.

    Args:
        plan: how much.
        file: the statements.
        model: directory of the model; None for the demo's architecture, with the file's words, from nothing.
    """

    def __init__(self, plan: Plan, file: Path, model: Path | None) -> None:
        self._plan, self._model = plan, model
        self._statements = read_statements(file, longest=plan.longest)

    @cached_property
    def _base(self) -> Start:
        plan = self._plan
        tokenizer: Any
        if self._model is None:
            tokenizer = word_tokenizer(self._statements)
            model = build_model(len(tokenizer), plan.tuning_seed)
        else:
            tokenizer = AutoTokenizer.from_pretrained(self._model)
            model = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
        task = make_task(
            seed=plan.tuning_seed, train=plan.sft.train, probe=plan.probe * (1 + len(plan.seeds)),
            answers=plan.sft.sft_steps * plan.sft.sft_batch, label_words=find_label_words(tokenizer),
            statements=self._statements,
        )  # fmt: skip
        train_sft(model, tokenizer, task, plan.sft, seed=plan.tuning_seed, advance=lambda step: None)
        return Start(model, tokenizer, task)

    def start(self, seed: int) -> Start:
        """Draw a seed's pairs.

        Args:
            seed: of the draw; every seed has held-out statements of its own.

        Returns:
            Where a seed's runs start from.
        """
        plan, base = self._plan, self._base
        place = (plan.tuning_seed, *plan.seeds).index(seed) * plan.probe
        training = random.Random(seed).sample(base.task.train, min(plan.steps * plan.batch, len(base.task.train)))
        return replace(
            base, task=replace(base.task, train=tuple(training), probe=base.task.probe[place : place + plan.probe])
        )


def word_tokenizer(statements: list[Statement]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for every word that is not rare, in small letters.

    Args:
        statements: whose words are counted.

    Returns:
        The tokenizer; ids 0, 1 and 2 are pad, EOS and unknown, as in the demo's.
    """
    cut = pre_tokenizers.Whitespace()
    counts = Counter(word for one in statements for word, _ in cut.pre_tokenize_str(one.text.lower()))
    words = {word for word, count in counts.items() if count >= _RARE} | {word.lower() for word in word_list()}
    names = ["<pad>", "<eos>", "<unk>", *sorted(words)]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), cut
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
