"""One rank of a pairwise normalized run under DDP, started by test_pairwise_runs.py; writes how its weights moved."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from gradent.trainer.pairwise.config import PairwiseNormalizedDPOConfig
from gradent.trainer.pairwise.trainer import PairwiseNormalizedDPOTrainer
from tests.trainer.rank_ddp import leave, pairs, tokenizer
from tests.trainer.runs import llama, with_lora

STEPS = 3


def train(
    trainer_class: type, config: type, out: Path, kind: str, batch: int, *, data: Dataset, steps: int
) -> tuple[Any, list[float]]:  # fmt: skip
    """A run of a trainer that is `DPOTrainer` in its arguments, plain SGD; it, and how its weights moved."""
    torch.set_num_threads(1)
    model = llama(vocab_size=97)
    reference = deepcopy(model) if kind == "full" else None
    model = model if kind == "full" else with_lora(model)
    start = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    trainer = trainer_class(
        model=model,
        ref_model=reference,
        args=config(
            output_dir=str(out / "run"), max_steps=steps, per_device_train_batch_size=batch, logging_steps=1,
            report_to="none", use_cpu=True, bf16=False, learning_rate=0.02, optim="sgd", max_grad_norm=0.0,
            lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    named = {name: parameter for name, parameter in model.named_parameters() if ".ref." not in name}
    moved = torch.cat([parameter.detach().flatten() for parameter in named.values()]) - start
    return trainer, moved.tolist()


def main(out: Path, kind: str, batch: int) -> None:
    trainer, moved = train(
        PairwiseNormalizedDPOTrainer, PairwiseNormalizedDPOConfig, out, kind, batch, data=pairs(), steps=STEPS
    )
    logs = [
        {key: value for key, value in entry.items() if key.startswith(("pairwise/", "loss"))}
        for entry in trainer.state.log_history
    ]
    seen = {"moved": moved, "logs": [entry for entry in logs if entry]}
    leave(out, trainer.args.process_index, seen)
