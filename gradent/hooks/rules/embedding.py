"""Embeddings: `G[ids_t] += b_t`, kept as ids and output gradients; nothing of the vocabulary's size is made."""

from __future__ import annotations

import torch.nn.functional as F

from gradent.hooks.rules.registry import Call, register_rule
from gradent.hooks.uses.uses import LookupUse, Use

__all__: list[str] = []


@register_rule(F.embedding)
def embedding(call: Call) -> list[Use]:
    """`F.embedding(ids, weight, padding_idx)`; rows at `padding_idx` get no gradient, as in torch."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    named = call.bind(*names, padding_idx=None, max_norm=None, scale_grad_by_freq=False)
    if named is None or named["max_norm"] is not None or named["scale_grad_by_freq"]:
        return []
    view = call.find(named["weight"])
    if view is None or not view.plain or view.flipped or len(view.shape) != 2:
        return []
    ids, padding = named["input"], named["padding_idx"]
    if not call.layout.splits(ids, 0) or not call.layout.splits(call.out, 1):
        return []
    return [LookupUse(view, ids, None if padding is None else padding % view.shape[0])]
