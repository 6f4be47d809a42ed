"""The sentiment task of Section 4.3: its model and statements, and DPO on its four styles of response.

The task is the demo's (`gradent.demo.task`), on generated statements and the demo's model, or on GPT-2 and tweets. The
paper's prompt is the statement; the demo's asks for a style as well, so that one SFT'd model serves all four styles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import load_dataset

from examples.paper.settings import Settings
from examples.paper.starts import load_pretrained
from examples.paper.watch import Row, summarize
from gradent import losses
from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.statements import LONGEST, Statement, read_statements
from gradent.demo.task import STYLES, Task, find_label_words, make_task, prompt_of, responses_of
from gradent.demo.train import train_dpo, train_sft
from gradent.errors import InputError

__all__ = ["SentimentStart", "load_sentiment", "make_sentiment", "run_styles"]


@dataclass(frozen=True)
class SentimentStart:
    """A model after SFT, its tokenizer, and the task."""

    model: Any
    tokenizer: Any
    task: Task


def make_sentiment(settings: Settings, seed: int) -> SentimentStart:
    """The demo's model and statements.

    Args:
        settings: how much.
        seed: of everything.

    Returns:
        The start, after SFT.
    """
    demo, tokenizer = settings.demo, build_tokenizer()
    model = build_model(len(tokenizer), seed)
    task = make_task(
        seed=seed, train=demo.train, probe=demo.probe, answers=12 * demo.train, usual_if_wrong=demo.usual_if_wrong
    )
    return _tune(SentimentStart(model, tokenizer, task), settings, seed)


def load_sentiment(settings: Settings, seed: int, path: Path | None) -> SentimentStart:
    """A pretrained model, on tweets.

    SFT's answers are the chosen responses of all four styles.

    Args:
        settings: how much.
        seed: of the choice of statements and the order of training.
        path: JSONL with `text` and `label`; None for the hub's `settings.tweets`, or generated statements.

    Returns:
        The start, after SFT.

    Raises:
        InputError: the settings name no model.
    """
    if settings.sentiment_model is None:
        raise InputError("The sentiment task has no model; give --model, or leave --small out.")
    model, tokenizer = load_pretrained(settings.sentiment_model)
    if tokenizer.eos_token is None:
        raise InputError(f"{settings.sentiment_model}: its tokenizer has no EOS token, which ends SFT's answers.")
    statements = None
    if path is not None:
        statements = read_statements(path)
    elif settings.tweets is not None:
        statements = _hub_statements(settings.tweets)
    demo = settings.demo
    task = make_task(
        seed=seed, train=demo.train, probe=demo.probe, answers=12 * demo.train,
        label_words=find_label_words(tokenizer), statements=statements,
    )  # fmt: skip
    if statements is not None:
        answers = tuple(
            (prompt_of(statement, style), responses_of(statement, style, task.label_words)[0])
            for statement in task.train
            for style in STYLES
        )
        task = replace(task, sft=answers)
    return _tune(SentimentStart(model, tokenizer, task), settings, seed)


def _tune(start: SentimentStart, settings: Settings, seed: int) -> SentimentStart:
    train_sft(start.model, start.tokenizer, start.task, settings.demo, seed=seed, advance=lambda step: None)
    return start


def _hub_statements(name: str) -> list[Statement]:
    """Distinct statements of one sentiment that are no longer than the demo's."""
    found: dict[str, set[bool]] = {}
    for row in load_dataset(name, split="train"):
        text = " ".join(row["text"].split())
        if row["label_text"] in ("positive", "negative") and 0 < len(text) <= LONGEST:
            found.setdefault(text, set()).add(row["label_text"] == "positive")
    return [Statement(text, True in signs) for text, signs in found.items() if len(signs) == 1]


def run_styles(start: SentimentStart, settings: Settings, seed: int) -> dict[str, list[Row]]:
    """DPO on every style, from the same model.

    Args:
        start: model and task.
        settings: how much.
        seed: of the order of the pairs.

    Returns:
        Style to a row a measured step, as of `watch.summarize`.
    """
    loss = losses.get("dpo", beta=settings.demo.beta)
    found = {}
    for style in STYLES:
        measured = train_dpo(
            start.model, start.tokenizer, start.task, style, settings.demo, seed=seed, advance=lambda step: None
        )
        grams = {each.step: each.gram for each in measured}
        found[style] = [{"style": style, "seed": seed, **row} for row in summarize(grams, loss)]
    return found
