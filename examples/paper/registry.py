"""Loss to trainer: TRL's own where TRL has the loss, `PairTrainer` where it has not.

Read in TRL 1.16: DPOTrainer has DPO ("sigmoid"), IPO ("ipo", log-ratios averaged over tokens: the paper's footnote 9)
and SPPO ("sppo_hard"); the experimental CPOTrainer has SimPO and CPO, whose likelihood term it averages over the
batch's chosen tokens (with `λ/mean n_w` in the place of Table 2's λ). Its hinge has that average too, and DPOTrainer's
is on log-ratios, so that neither is SLiC-HF; KTOTrainer is for unpaired data, and estimates its reference point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from examples.paper.settings import Settings
from examples.paper.starts import Start
from examples.paper.trainer import PairTrainer
from gradent import losses
from gradent.demo.task import TokenPair
from gradent.demo.train import PairCollator, SplitCollator, padded

__all__ = ["NAMES", "TRAINERS", "Trained", "make_trainer", "trained_loss"]

NAMES = {
    "dpo": "DPO", "rdpo": "R-DPO", "simpo": "SimPO", "ipo": "IPO", "rrhf": "RRHF", "slic": "SLiC-HF", "cpo": "CPO",
    "dpop": "DPOP", "kto": "KTO (paired)", "sppo": "SPPO",
}  # fmt: skip
"""Names in the figures, in the order of Table 2."""


@dataclass(frozen=True)
class Trained:
    """How a loss is trained.

    Attributes:
        build: makes its trainer.
        by: whose trainer it is, in words.
        options: what its config is given.
    """

    build: Callable[..., Any]
    by: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _dpo(start: Start, model: Any, pairs: list[TokenPair], common: dict[str, Any], options: Any, **rest: Any) -> Any:
    return DPOTrainer(
        model=model,
        ref_model=start.build() if start.own_reference else None,
        args=DPOConfig(**common, **options, beta=0.1, max_length=None),
        data_collator=PairCollator(pairs),
        **rest,
    )


def _cpo(start: Start, model: Any, pairs: list[TokenPair], common: dict[str, Any], options: Any, **rest: Any) -> Any:
    return CPOTrainer(
        model=model,
        args=CPOConfig(**common, **options, beta=0.1, max_length=start.longest),
        data_collator=SplitCollator(pairs),
        **rest,
    )


def _own(start: Start, model: Any, pairs: list[TokenPair], common: dict[str, Any], options: Any, **rest: Any) -> Any:
    loss = losses.get(options["loss"])
    return PairTrainer(loss=loss, pairs=pairs, model=model, args=TrainingArguments(**common), **rest)


_TRL, _EXPERIMENTAL, _OWN = "TRL, DPOTrainer", "TRL, CPOTrainer (experimental)", "this example's PairTrainer"
TRAINERS: dict[str, Trained] = {
    "dpo": Trained(_dpo, _TRL, {"loss_type": ["sigmoid"]}),
    "rdpo": Trained(_own, _OWN, {"loss": "rdpo"}),
    "simpo": Trained(_cpo, _EXPERIMENTAL, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}),
    "ipo": Trained(_dpo, _TRL, {"loss_type": ["ipo"]}),
    "rrhf": Trained(_own, _OWN, {"loss": "rrhf"}),
    "slic": Trained(_own, _OWN, {"loss": "slic"}),
    "cpo": Trained(_cpo, _EXPERIMENTAL, {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    "dpop": Trained(_own, _OWN, {"loss": "dpop"}),
    "kto": Trained(_own, _OWN, {"loss": "kto"}),
    "sppo": Trained(_dpo, _TRL, {"loss_type": ["sppo_hard"]}),
}
"""Loss to how it is trained, in the order of Table 2."""


def trained_loss(name: str, chosen_len: torch.Tensor) -> losses.Loss:
    """The loss that is really trained, as gradent knows it.

    Args:
        name: a key of `TRAINERS`.
        chosen_len: tokens of the chosen responses, `[N]`: CPOTrainer's likelihood term is a mean over them.

    Returns:
        The loss.
    """
    if name == "ipo":
        return losses.get("ipo", length_normalized=True)
    if name == "cpo":
        return losses.get("cpo", lam=1.0 / chosen_len.double().mean().item())
    return losses.get(name)


def make_trainer(
    name: str,
    start: Start,
    model: Any,
    settings: Settings,
    common: Mapping[str, Any],
    rate: float,
    callbacks: list[Any],
) -> Any:
    """A trainer that has not begun.

    Args:
        name: a key of `TRAINERS`.
        start: where from.
        model: the policy, which it trains.
        settings: how much.
        common: arguments of `gradent.demo.train.trainer_arguments`.
        rate: learning rate.
        callbacks: that look on.

    Returns:
        A trainer of transformers.
    """
    arguments = {
        **common,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "optim": settings.optimizer,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.checkpointing,
        "remove_unused_columns": False,
    }
    rows = Dataset.from_list(
        [
            {"pair": number, "prompt": each.prompt, "chosen": each.chosen, "rejected": each.rejected}
            for number, each in enumerate(start.train)
        ]
    )
    trained = TRAINERS[name]
    return trained.build(
        start, model, start.pairs, arguments, trained.options, train_dataset=rows,
        processing_class=padded(start.tokenizer), callbacks=callbacks,
    )  # fmt: skip
