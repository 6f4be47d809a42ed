"""What is run: the paper's settings where it states them (Appendix C), and what runs in minutes on a CPU.

The paper states rank 64 and learning rate 5e-6 (C.2), the losses' hyperparameters (C.3, the defaults of
`gradent.losses`) and, of the sentiment task, the model and the rate. LoRA's alpha and dropout and the numbers of SFT
are those of its published scripts. Steps, pairs a step, sequence length, and how many pairs are held out, it does not
state: those of `PAPER` are this example's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradent.demo.settings import EMBEDDED, PRETRAINED, DemoSettings

__all__ = ["PAPER", "SMALL", "Lora", "Settings", "on_model", "shown_name"]


def shown_name(model: str) -> str:
    """A model as figures and pages name it: a directory without its path.

    Args:
        model: hub id, directory or architecture.

    Returns:
        Its name.
    """
    return Path(model).resolve().name if Path(model).is_dir() else model


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA's options; the target modules are PEFT's own choice for the architecture."""

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is trained and measured, and on what.

    Attributes:
        small: whether the demo's model and generated statements stand in for the paper's models and data.
        models: of the comparisons, the first is Figure 2's, the second Figure 5's: hub ids or directories; for the
            demo, architectures of `starts.ARCHITECTURES`.
        comparisons: hub id of the pairs; the demo's are generated.
        sentiment_model: hub id or directory; None for the demo's own.
        tweets: hub id of the labelled statements; None to generate them.
        seeds: of data, embedded weights and training.
        train: pairs that are trained on, at most.
        probe: held-out pairs that are measured.
        steps: optimizer steps of every loss.
        batch: pairs a step.
        every: steps between measurements.
        optimizer: `optim` of transformers' TrainingArguments. With "sgd" a loss's rate is `rate` times DPO's mean
            `d_w + d_l` at the start over its own: the first steps of all losses are of like length. Adam needs none of
            that, and all have `rate`.
        rate: learning rate, constant.
        max_length: tokens of prompt and response, at most.
        lora: None to train all parameters.
        bf16: load and train in bfloat16.
        checkpointing: trade time for memory.
        tokens: pairs of Figure 4b.
        demo: settings of the sentiment task.
    """

    small: bool
    models: tuple[str, str]
    comparisons: str | None
    sentiment_model: str | None
    tweets: str | None
    seeds: tuple[int, ...]
    train: int
    probe: int
    steps: int
    batch: int
    every: int
    optimizer: str
    rate: float
    max_length: int | None
    lora: Lora | None
    bf16: bool
    checkpointing: bool
    tokens: int
    demo: DemoSettings

    def to_record(self) -> dict[str, Any]:
        """Settings that a reader needs beside the figures.

        Returns:
            Name to text.
        """
        tuned = f"LoRA, rank {self.lora.rank}, alpha {self.lora.alpha}" if self.lora else "all parameters"
        demo = self.demo
        return {
            "comparisons": f"{self.comparisons or 'generated'}, {self.train} pairs, {self.probe} held out",
            "models of the comparisons": ", ".join(dict.fromkeys(map(shown_name, self.models))),
            "trained": tuned,
            "every loss": f"{self.steps} steps of {self.batch} pairs, {self.optimizer}",
            "model of the sentiment task": shown_name(self.sentiment_model) if self.sentiment_model else "the demo's",
            "statements": f"{self.tweets or 'generated'}, {demo.train}, {demo.probe} held out",
            "SFT": f"{demo.sft_steps} steps of {demo.sft_batch} answers, AdamW, {demo.sft_lr:g}",
            "DPO of the sentiment task": (
                f"{demo.dpo_steps} steps of {demo.dpo_batch} pairs, {demo.dpo_optimizer}, {demo.dpo_lr:g}"
            ),
            "seeds": ", ".join(map(str, self.seeds)),
        }


PAPER = Settings(
    small=False,
    models=("mistralai/Mistral-7B-Instruct-v0.3", "meta-llama/Meta-Llama-3-8B-Instruct"),
    comparisons="CarperAI/openai_summarize_comparisons",
    sentiment_model="openai-community/gpt2",
    tweets="mteb/tweet_sentiment_extraction",
    seeds=(0,),
    train=16_000,
    probe=128,
    steps=1000,
    batch=16,
    every=50,
    optimizer="adamw_torch",
    rate=5e-6,
    max_length=1024,
    lora=Lora(),
    bf16=True,
    checkpointing=True,
    tokens=8,
    demo=DemoSettings(
        train=8192, probe=128, sft_steps=128, sft_lr=1.41e-5, dpo_optimizer="adamw_torch", dpo_lr=5e-6, dpo_steps=256,
        measure_every=16,
    ),
)  # fmt: skip
"""The paper's own models and data; one GPU of 80 GB."""

SMALL = Settings(
    small=True,
    models=("llama", "gpt2"),
    comparisons=None,
    sentiment_model=None,
    tweets=None,
    seeds=(0, 1, 2),
    train=EMBEDDED.train,
    probe=EMBEDDED.probe,
    steps=60,
    batch=32,
    every=10,
    optimizer="sgd",
    rate=1e-2,
    max_length=None,
    lora=None,
    bf16=False,
    checkpointing=False,
    tokens=8,
    demo=EMBEDDED,
)
"""The demo's model and statements, for `--small`; `starts` says what stands in for summaries."""


def on_model(settings: Settings, model: str) -> Settings:
    """The same on one model of one's own.

    Args:
        settings: `PAPER`, or `SMALL`, of which the small model's numbers are replaced by gentler and fewer ones, the
            demo's for a pretrained model.
        model: hub id or directory.

    Returns:
        The settings.
    """
    settings = replace(settings, models=(model, model), sentiment_model=model)
    if not settings.small:
        return settings
    return replace(
        settings, train=PRETRAINED.train, probe=PRETRAINED.probe, steps=PRETRAINED.dpo_steps, batch=4,
        optimizer=PRETRAINED.dpo_optimizer, rate=PRETRAINED.dpo_lr, max_length=512, demo=PRETRAINED,
    )  # fmt: skip
