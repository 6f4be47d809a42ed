"""Gradients that were materialized as they came, and the queue of small ones, which a few calls reduce.

A bias, a norm or a LoRA factor has so small a gradient that the calls which reduce it cost more than its sums: it waits
for others of its size.

Letters: N rows of the running micro-batch, R rows of one forward, D directions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.kernels.common.budget import waiting_limits
from gradent.kernels.common.numerics import in_memory_order, reduce_stacked, reduce_tiles
from gradent.kernels.common.streams import sent
from gradent.kernels.common.wanted import Wanted

__all__ = ["MaterializedRows", "Slot", "SmallGradientQueue", "row_gradients"]

Slot = tuple[int, ...]
Metric = Callable[[int, Slot], tuple[Tensor | None, Tensor | None]]
"""Parameter number and slot -> the root that multiplies gradients, or None, and directions `[D, ...]`, or None."""


@dataclass(frozen=True)
class MaterializedRows:
    """Gradients of one slot that were formed as they came: of R rows, `[R, *shape of the slot]`."""

    rows: Sequence[int]
    slot: Slot
    grads: Tensor


def row_gradients(parts: Sequence[MaterializedRows], count: int, root: Tensor | None) -> Tensor:
    """Every row's gradient of one slot times `root`, `[N, *shape]`, zero where it has none; not to be written to."""
    grads = _in_order(parts, count)
    return grads if root is None else grads * root


def _in_order(parts: Sequence[MaterializedRows], count: int) -> Tensor:
    parts = sorted(parts, key=lambda part: min(part.rows))
    rows = [row for part in parts for row in part.rows]
    first, at = parts[0].grads, torch.tensor(rows)
    if sorted(rows) == list(range(count)):
        grads = first if len(parts) == 1 else torch.cat([part.grads for part in parts])
        return grads if rows == list(range(count)) else grads[sent(at.argsort(), grads.device)]
    at = sent(at, first.device)
    tiles = first.new_zeros(count, *first.shape[1:])
    for part, where in zip(parts, torch.split(at, [len(part.rows) for part in parts]), strict=True):
        tiles.index_add_(0, where, part.grads)
    return tiles


class SmallGradientQueue:
    """Parameters that wait to be reduced together."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._parts: dict[int, Sequence[MaterializedRows]] = {}
        self.held = 0
        """Bytes that wait."""

    def add(self, param: int, parts: Sequence[MaterializedRows]) -> None:
        """Let a parameter wait; `parts` are all there is of it, of one slot."""
        self._parts[param] = parts
        self.held += sum(part.grads.nbytes for part in parts)

    def is_full(self, budget: int) -> bool:
        """Whether enough waits to be reduced now."""
        single, together = waiting_limits(budget)
        return self.held > together - single

    def reduce(self, metric: Metric) -> dict[int, Tensor]:
        """Parameter number -> entries `[M]` of all that waits (and goes on waiting), those of one size in one call."""
        alike: dict[tuple[int, torch.dtype, torch.device], dict[int, Tensor]] = defaultdict(dict)
        entries: dict[int, Tensor] = {}
        for param, parts in self._parts.items():
            root, directions = metric(param, parts[0].slot)
            grads = row_gradients(parts, self._wanted.rows, root)
            if directions is not None:
                along = directions if root is None else directions * root
                entries[param] = reduce_tiles(grads, self._wanted, along)
                continue
            flat, _ = in_memory_order(grads)
            alike[flat.shape[1], flat.dtype, flat.device][param] = flat
        for group in alike.values():
            reduced = reduce_stacked(torch.stack(list(group.values()), 1), self._wanted)
            entries |= dict(zip(group, reduced.unbind(), strict=True))
        return entries

    def clear(self) -> None:
        """Let go of what waits."""
        self._parts.clear()
        self.held = 0
