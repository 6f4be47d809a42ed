"""One trainer's step by hand, in the ways in which trainers call a model: what piggybacking has to make sense of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from gradent.pairs.batch import PairBatch

Loss = Callable[[Tensor, Tensor], Tensor]


def dpo(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """DPO's loss with a reference of constant log-ratios, a mean over the batch."""
    return -F.logsigmoid(beta * (chosen - rejected + 3.0)).mean()


def with_fused_head(model: nn.Module) -> nn.Module:
    """The model (or the base under its adapter) with TRL's fused head, as DPOTrainer puts it on."""
    add_fused_lm_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return model


def labels_of(batch: PairBatch) -> Tensor:
    return batch.input_ids.masked_fill(batch.completion_mask == 0, -100)


def through_fused_head(model: nn.Module, batch: PairBatch, loss: Loss = dpo) -> Tensor:
    """As TRL's DPOTrainer from 1.15 on; the model carries `add_fused_lm_head`."""
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, labels=labels_of(batch),
        fused_lm_head=True,
    )  # fmt: skip
    return loss(*output.log_probs.sum(1).chunk(2))


def through_logits(model: nn.Module, batch: PairBatch, loss: Loss = dpo) -> Tensor:
    """As older trainers, and those of CPO and ORPO: the labels never reach the model."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits = output.logits[:, -batch.input_ids.shape[1] :]  # prompt tuning puts virtual tokens in front
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return loss(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2))
