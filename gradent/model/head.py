"""What enters a model's head, and what leaves it, at the positions that predict a response.

Letters: L tokens of a row, T tokens of its response, d the width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradent.kernels.common.numerics import accumulator
from gradent.model.calls import forward_marked
from gradent.model.parameters import output_embeddings

__all__ = ["HeadPass", "forward_head"]


class HeadPass(NamedTuple):
    """Of a row's T response tokens: last hidden states `[T, d]`, the logits made of them `[T, V]`, token ids `[T]`."""

    hidden: Tensor
    logits: Tensor
    ids: Tensor

    def errors(self, span: slice = slice(None)) -> Tensor:
        """`e_y − softmax(logits)` of some tokens, `[t, V]`, float32 or float64: a log-prob's gradient by the logits."""
        wide = self.logits[span].to(accumulator(self.logits.dtype))
        errors = wide.softmax(-1).neg_()
        targets = self.ids[span][:, None]
        return errors.scatter_add_(1, targets, torch.ones_like(targets, dtype=errors.dtype))


@torch.no_grad()
def forward_head(model: nn.Module, ids: Tensor, marks: Tensor, *, trim: bool) -> HeadPass | None:
    """The head of one row, ids and marks `[L]`, in one forward; None where the model does not show its head's input."""
    head = output_embeddings(model)
    if head is None:
        return None
    seen: list[Any] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.extend(args[:1]))
    try:
        logits, kept_ids, kept_marks = forward_marked(model, ids[None], marks[None], trim=trim)
    finally:
        handle.remove()
    count = logits.shape[1]
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() != 3 or seen[0].shape[1] < count:
        return None
    places = kept_marks[0, 1:].bool().nonzero()[:, 0]
    return HeadPass(seen[0][0, -count:][places], logits[0, places], kept_ids[0, 1:][places])
