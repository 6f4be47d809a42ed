"""`PairTrainer`: any loss of `gradent.losses` as a transformers Trainer, for the losses that TRL's trainers lack.

A step is the mean over the batch of `loss.value`, on log-probs summed over completion tokens. The reference's log-probs
are computed once, before the first step, so that no second model is held.

Letters: B pairs, L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from trl.trainer.utils import disable_dropout_in_model

from gradent.demo.task import TokenPair
from gradent.demo.train import PairCollator
from gradent.losses import Loss
from gradent.measurement import sequence_logps
from gradent.pairs.batch import PairBatch

__all__ = ["NumberedCollator", "PairTrainer", "completion_logps", "reference_logps"]


class NumberedCollator(PairCollator):
    """Batches of chosen rows, then rejected rows, and beside them which pairs they are."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of B pairs.

        Args:
            rows: B rows of the dataset; only their `pair` is read.

        Returns:
            `input_ids`, `attention_mask`, `completion_mask`, each int64 `[2B, L]`, and `pair`, int64 `[B]`.
        """
        return {**super().__call__(rows), "pair": torch.tensor([row["pair"] for row in rows])}


def completion_logps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Differentiable log-probs of the completions.

    Args:
        model: maps `input_ids` and `attention_mask` to logits.
        inputs: a batch of `PairCollator`.

    Returns:
        Sums over completion tokens, nats, float32 or wider `[2B]`.
    """
    ids = inputs["input_ids"]
    logits = model(input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(2)
    return (tokens * inputs["completion_mask"][:, 1:]).sum(1)


def reference_logps(model: Any, pairs: Sequence[TokenPair], batch: int) -> tuple[Tensor, Tensor]:
    """What the model gives the pairs before it is trained.

    Args:
        model: the policy at its start.
        pairs: N pairs.
        batch: pairs a forward.

    Returns:
        `(chosen, rejected)`, float64 `[N]`, nats.
    """
    parts = [
        sequence_logps(model, PairBatch.from_tokens(pairs[start : start + batch]))
        for start in range(0, len(pairs), batch)
    ]
    chosen, rejected = (torch.cat(side) for side in zip(*parts, strict=True))
    return chosen, rejected


class PairTrainer(Trainer):
    """Trains a policy on a loss of pairs.

    Dropout is switched off, as TRL's preference trainers do: otherwise policy and reference differ before the first
    step.

    Args:
        loss: of `gradent.losses`.
        pairs: token ids by the dataset's column `pair`.
        **kwargs: of transformers' Trainer; the collator is the trainer's own.
    """

    def __init__(self, *, loss: Loss, pairs: Sequence[TokenPair], **kwargs: Any) -> None:
        super().__init__(data_collator=NumberedCollator(pairs), **kwargs)
        self.model_accepts_loss_kwargs = False  # the mean over pairs is ours; accumulation divides it
        disable_dropout_in_model(self.model)
        self.pair_loss = loss
        self._reference = None
        if loss.needs_reference:
            self._reference = reference_logps(self.model, pairs, self.args.per_device_train_batch_size)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the loss over the batch's pairs.

        Args:
            model: the policy.
            inputs: a batch of `NumberedCollator`.
            return_outputs: also return the log-probs, `[2B]`.
            num_items_in_batch: not used.

        Returns:
            A scalar, or `(scalar, log-probs)`.
        """
        logps = completion_logps(model, inputs)
        chosen, rejected = logps.chunk(2)
        chosen_len, rejected_len = inputs["completion_mask"].sum(1).chunk(2)
        given = {"chosen_len": chosen_len, "rejected_len": rejected_len}
        if self._reference is not None:
            numbers = inputs["pair"].cpu()
            given["ref_chosen_logp"], given["ref_rejected_logp"] = (
                side[numbers].to(logps.device) for side in self._reference
            )
        value = self.pair_loss.value(chosen_logp=chosen, rejected_logp=rejected, **given).mean().to(logps.dtype)
        return (value, logps) if return_outputs else value
