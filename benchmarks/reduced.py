"""The rows of one forward reduced in one call: what a pass decides and does for a weight that is used once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradent.kernels import dispatch
from gradent.kernels.common.wanted import Wanted
from gradent.kernels.dispatch import is_even, reduce_at_once, reduce_group
from gradent.kernels.strategy import Product, decide

__all__ = ["reduce_rows"]


def reduce_rows(
    u: Tensor,
    v: Tensor,
    wanted: Wanted,
    *,
    budget: int,
    lengths: Sequence[int] | None = None,
    weight: Tensor | None = None,
    directions: Tensor | None = None,
) -> Tensor:
    """Entries `[M]` of all groups from u `[N, T, O]` and v `[N, T, I]`, of which `lengths` tokens a row count."""
    if not wanted.groups:
        return torch.zeros(0, dtype=torch.float64, device=u.device)
    ends = [u.shape[1]] * len(u) if lengths is None else list(lengths)
    product = Product(
        rows=len(u),
        lengths=(max(ends, default=0),) * wanted.largest,
        out=u.shape[2],
        inp=v.shape[2],
        dtypes=(u.dtype, v.dtype),
        device=u.device.type,
        has_kernels=dispatch.on_kernels(u, v) and is_even(u) and is_even(v),
        is_complete=True,
        is_weighted=weight is not None,
        directions=wanted.directions,
    )
    for attempted in (product, replace(product, has_kernels=False)):
        strategy = decide(attempted, budget)
        if strategy.reducer != "group_by_group":
            entries = reduce_at_once(strategy, u, v, wanted, lengths=lengths, weight=weight, directions=directions)
            if entries is not None:
                return entries
    groups = [[(u[row, : ends[row]], v[row, : ends[row]]) for row in group] for group in wanted.groups]
    return torch.cat([reduce_group(group, budget=budget, weight=weight, directions=directions) for group in groups])
