"""The trainers that are compared, on equal pairs, batches and orders of pairs.

All train on gradent's own token ids (no EOS, which would be one more shared token), in the layouts that TRL's collators
have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cures_parts.calibration import RewardCalibratedDPOTrainer, RewardCalibratedOnHeadDPOTrainer
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from gradent.demo.task import Task, TokenPair, tokenize_style
from gradent.demo.train import PairCollator, SplitCollator, padded, pair_rows, train_quietly, trainer_arguments
from gradent.trainer import PairwiseNormalizedDPOConfig, TokenMaskedDPOConfig
from gradent.trainer.adaptive_nll.trainer import AdaptiveNLLDPOConfig, AdaptiveNLLDPOTrainer
from gradent.trainer.pairwise.trainer import PairwiseNormalizedDPOTrainer
from gradent.trainer.token_masking.trainer import TokenMaskedDPOTrainer

__all__ = ["METHODS", "Run", "train"]

BETA = 0.1


@dataclass(frozen=True)
class Method:
    """A trainer.

    Attributes:
        trainer: its class.
        config: its arguments' class.
        options: what is set beside what all have.
        reference: whether it has a reference model, which is the model after SFT.
    """

    trainer: type
    config: type
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = True


METHODS: dict[str, Method] = {
    "DPO": Method(DPOTrainer, DPOConfig),
    "RPO 0.1": Method(DPOTrainer, DPOConfig, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}),
    "RPO": Method(DPOTrainer, DPOConfig, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
    "adaptive": Method(AdaptiveNLLDPOTrainer, AdaptiveNLLDPOConfig),
    "CPO": Method(CPOTrainer, CPOConfig, {"loss_type": "sigmoid", "cpo_alpha": 1.0}, reference=False),
    "SimPO": Method(
        CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}, reference=False
    ),
    "calibrated": Method(RewardCalibratedDPOTrainer, PairwiseNormalizedDPOConfig),
    "calibrated head": Method(RewardCalibratedOnHeadDPOTrainer, PairwiseNormalizedDPOConfig),
    "pairwise": Method(PairwiseNormalizedDPOTrainer, PairwiseNormalizedDPOConfig),
    "masked": Method(TokenMaskedDPOTrainer, TokenMaskedDPOConfig),
}
"""Name in the tables -> what runs: both designs of the paper's Section 5 behind DPO, DPO with a likelihood
term (fixed, and as large as the account asks for) and two more losses of its Table 2."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        method: a key of `METHODS`.
        style: a key of `gradent.demo.task.STYLES`.
        optimizer: "sgd" or "adamw_torch".
        rate: learning rate, constant; there is no clipping and no weight decay.
        steps: optimizer steps.
        batch: pairs a step.
        seed: of the order of the pairs.
        masks: options of the masked trainer's masks; of no other's.
    """

    method: str
    style: str
    optimizer: str
    rate: float
    steps: int
    batch: int
    seed: int
    masks: Mapping[str, float] = field(default_factory=dict)


def train(run: Run, model: Any, tokenizer: Any, task: Task, watch: TrainerCallback) -> Any:
    """Train.

    Args:
        run: what.
        model: the model after SFT; it is left as it is.
        tokenizer: its tokenizer.
        task: whose training statements are trained on.
        watch: looks on.

    Returns:
        The trainer, done.
    """
    method = METHODS[run.method]
    pairs: list[TokenPair] = tokenize_style(tokenizer, task.train, run.style, task.label_words)
    collator = PairCollator if method.reference else SplitCollator
    with trainer_arguments(run.seed) as common:
        trainer = method.trainer(
            model=copy.deepcopy(model),
            **({"ref_model": copy.deepcopy(model)} if method.reference else {}),
            args=method.config(
                **common, **method.options, **(run.masks if run.method == "masked" else {}),
                beta=BETA, max_steps=run.steps, per_device_train_batch_size=run.batch, learning_rate=run.rate,
                lr_scheduler_type="constant", optim=run.optimizer, max_grad_norm=0.0, weight_decay=0.0,
                max_length=None if method.reference else 1024, remove_unused_columns=False,
            ),
            data_collator=collator(pairs),
            train_dataset=pair_rows(task, run.style),
            processing_class=padded(tokenizer),
            callbacks=[watch],
        )  # fmt: skip
        train_quietly(trainer)
    return trainer
