"""TRL's GRPOTrainer with one line more: the callback says what a step does to every rollout of a group.

    trainer = GRPOTrainer(..., callbacks=[EntanglementCallback(every=1)])

python examples/grpo.py                                   # a tiny model, made and taught its sentences on the spot
python examples/grpo.py --model my-model --word friend    # a model of yours (a folder, or a name on the hub)

The reward is a rule: 1 where the rollout has the word, else 0. Printed are the reward as it rises and, of the last
measured step with contrast, a line a group: how many of its positives (advantage > 0) the step lowers, and by how many
nats each source moves them on average:

    step 38, group 0: 3 of 8 positive, 0 lowered: own +0.08, positives +0.11, negatives -0.04, ... (nats)
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from rich.console import Console
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from gradent import EntanglementCallback

STORIES = (
    "Once upon a time, there was a", "One day, a little girl", "Tom and his dog went to", "The big cat was",
    "Lily saw a", "It was a sunny day and", "Ben and Mia were", "The old man had a",
)  # fmt: skip
"""Prompts for a model of the user's."""
THINGS, VERBS = ("film", "soup", "book"), ("was", "felt")
ENDS = ("truly good", "quite bad", "a quiet joy", "a loud bore", "quite warm", "truly cold", "bright", "dull")
"""What the tiny model's sentences are made of."""


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        prompts: what the rollouts continue.
        word: what is rewarded.
        rate: of learning.
    """

    model: Any
    tokenizer: Any
    prompts: tuple[str, ...]
    word: str
    rate: float


def make_start(model: str | None = None, word: str | None = None, steps: int = 120) -> Start:
    """A model of the user's, or a tiny one that has learned some sentences.

    Args:
        model: a folder, or a name on the hub; None for the tiny model.
        word: what is rewarded; None for a word that either says now and then.
        steps: of teaching the tiny model.

    Returns:
        The start.
    """
    if model is None:
        tokenizer, tiny = make_tokenizer(), make_model()
        teach(tiny, tokenizer, steps)
        prompts = tuple(f"the {thing} {verb}" for thing in THINGS for verb in VERBS)
        return Start(tiny, tokenizer, prompts, word or "good", rate=3e-4)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    given = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return Start(given, tokenizer, STORIES, word or "friend", rate=1e-4)


def teach(model: torch.nn.Module, tokenizer: Any, steps: int) -> None:
    """Next-token training on sentences such as "the film was quite warm . the film felt dull . <eos>".

    Args:
        model: the tiny model.
        tokenizer: its tokenizer.
        steps: of AdamW, on 32 texts each.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def pick(of: tuple[str, ...]) -> str:
        return of[int(torch.randint(len(of), ()))]

    for _ in range(steps):
        texts = []
        for _ in range(32):
            thing = pick(THINGS)
            clauses = [f"the {thing} {pick(VERBS)} {pick(ENDS)} ." for _ in range(int(torch.randint(1, 4, ())))]
            texts.append(" ".join([*clauses, tokenizer.eos_token]))
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def has_word(word: str) -> Callable[..., list[float]]:
    """The reward.

    Args:
        word: what is looked for, in small letters.

    Returns:
        A reward function as TRL takes it: 1 for each completion that has the word, else 0.
    """

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(word in completion.lower()) for completion in completions]

    return reward


def make_trainer(
    start: Start,
    out: str,
    *,
    steps: int = 40,
    groups: int = 4,
    rollouts: int = 8,
    tokens: int = 32,
    rate: float | None = None,
    seed: int = 0,
    trainer: type[GRPOTrainer] = GRPOTrainer,
    **more: Any,
) -> Any:
    """GRPO with AdamW: every step has rollouts of its own, which are used once.

    Args:
        start: model, tokenizer, prompts and word.
        out: the trainer's folder.
        steps: of the optimizer.
        groups: prompts a step.
        rollouts: of each prompt.
        tokens: most tokens of a rollout.
        rate: of learning; None for the start's.
        seed: of prompts and rollouts.
        trainer: GRPOTrainer, or a subclass.
        more: passed on to the trainer (`callbacks`).

    Returns:
        The trainer.
    """
    return trainer(
        model=start.model,
        reward_funcs=has_word(start.word),
        args=GRPOConfig(
            output_dir=out, max_steps=steps, per_device_train_batch_size=groups * rollouts, num_generations=rollouts,
            max_completion_length=tokens, learning_rate=rate or start.rate, lr_scheduler_type="constant", beta=0.0,
            num_iterations=1, logging_steps=5, seed=seed, report_to="none", save_strategy="no", bf16=False,
            use_cpu=not torch.cuda.is_available(), activation_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": list(start.prompts)}),
        processing_class=start.tokenizer,
        **more,
    )  # fmt: skip


def describe(record: Any) -> list[str]:
    """What a measured step does to the positives of each group.

    Args:
        record: of the callback.

    Returns:
        A line a group that has positives and negatives.
    """
    rows, lines = record.rows, []
    total = sum(rows.moved.values())
    for group in rows.group.unique().tolist():
        mine = rows.group == group
        positive = mine & (rows.weight > 0)
        if not bool(positive.any()):
            continue
        parts = ", ".join(f"{source} {float(moved[positive].mean()):+.2f}" for source, moved in rows.moved.items())
        lowered = int((total[positive] < 0).sum())
        lines.append(
            f"step {record.step}, group {group}: {int(positive.sum())} of {int(mine.sum())} positive, "
            f"{lowered} lowered: {parts} (nats)"
        )
    return lines


def main(
    model: Annotated[str | None, typer.Option(help="A folder, or a name on the hub; a tiny model if left out.")] = None,
    word: Annotated[str | None, typer.Option(help="What is rewarded.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 40,
    groups: Annotated[int, typer.Option(help="Prompts a step.")] = 4,
    rollouts: Annotated[int, typer.Option(help="Rollouts of each prompt.")] = 8,
    tokens: Annotated[int, typer.Option(help="Most tokens of a rollout.")] = 32,
    rate: Annotated[float | None, typer.Option(help="Of learning.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tiny model, the prompts and the rollouts.")] = 0,
) -> None:
    """Train, and show the reward and what the last steps did to the positives."""
    torch.manual_seed(seed)
    start, callback, console = make_start(model, word), EntanglementCallback(every=1), Console(width=120)
    sizes = {"steps": steps, "groups": groups, "rollouts": rollouts, "tokens": tokens, "rate": rate, "seed": seed}
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(start, out, callbacks=[callback], **sizes)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            console.print(f"steps to {entry['step']}: reward {entry['reward']:.2f}")
    last = next((lines for record in reversed(callback.records) if (lines := describe(record))), [])
    for line in last:
        console.print(line)


if __name__ == "__main__":
    typer.run(main)
