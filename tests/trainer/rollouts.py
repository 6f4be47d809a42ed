"""Tiny trainings on rollouts, with any admitted release of TRL: two prompts of four rollouts a step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

PROMPTS = ("Say a word:", "And you?", "Once more, please:", "Why?")


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """How many of a rollout's tokens are even, and a little for its first: rollouts of a prompt differ."""
    return [sum(number % 2 == 0 for number in ids) + ids[0] / 1000 for ids in completion_ids]


def make_rollouts(
    kinds: tuple[Any, Any],
    model: nn.Module,
    tokenizer: Any,
    out: Path,
    callbacks: Sequence[Any] = (),
    *,
    options: dict[str, Any] | None = None,
    data: Any = None,
    **arguments: Any,
) -> Any:
    """A trainer of two steps of plain SGD without clipping, silent; settings that a release does not know are left."""
    trainer, config = kinds
    settings = {
        "output_dir": str(out), "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 6, "temperature": 0.7, "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "seed": 7, **arguments,
    }  # fmt: skip
    known = inspect.signature(config).parameters
    return trainer(
        model=model,
        args=config(**{name: value for name, value in settings.items() if name in known}),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]) if data is None else data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **({"reward_funcs": reward} if options is None else options),
    )
