"""The cheap stand-ins of measured pairs beside the exact values: of all ranks, and as a window's scalars.

Letters: k pairs of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradent.pair_gram import PairGram
from gradent.proxies import PairProxies
from gradent.record.table import spearman

__all__ = ["join_proxies", "summarize_proxies"]

FEWEST = 10
"""Pairs below which no rank correlation is told."""

_NAMES = ("ches", "ches_normalized", "chosen_logp", "rejected_logp", "chosen_len", "rejected_len")


def join_proxies(parts: Sequence[PairProxies | None]) -> PairProxies | None:
    """The stand-ins of all ranks' pairs; None where one of them has none."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    heads = [part.head for part in known if part.head is not None]
    return PairProxies(
        **{name: torch.cat([getattr(part, name) for part in known]) for name in _NAMES},
        head=PairGram.join(heads) if len(heads) == len(known) else None,
        seconds={name: sum(part.seconds[name] for part in known) for name in known[0].seconds},
    )


def summarize_proxies(found: Sequence[tuple[PairGram, PairProxies]]) -> dict[str, float]:
    """The `gradent/proxy/...` scalars of a window: means, and rank correlations with the exact cosine."""
    scalars: dict[str, float] = {}
    if not found:
        return scalars
    cosine = torch.cat([gram.cosine for gram, _ in found])
    for name in ("ches", "ches_normalized", "head_cosine"):
        values = torch.cat([_values(part, name) for _, part in found])
        known = values.isfinite() & cosine.isfinite()
        if not bool(known.any()):
            continue
        scalars[f"gradent/proxy/{name}"] = float(values[known].mean())
        rho = spearman(values[known].numpy(), cosine[known].numpy()) if int(known.sum()) >= FEWEST else None
        if rho is not None:
            scalars[f"gradent/proxy/{name}/spearman"] = rho
    return scalars


def _values(part: PairProxies, name: str) -> Tensor:
    if name != "head_cosine":
        value: Tensor = getattr(part, name)
        return value
    return torch.full_like(part.ches, float("nan")) if part.head is None else part.head.cosine
