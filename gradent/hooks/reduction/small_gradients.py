"""Gradients that were materialized as they came, and the queue of small ones, which a few calls reduce.

A bias, a norm or a LoRA factor has so small a gradient that the calls which reduce it cost more than its sums: it waits
for others of its size.

Letters: N rows of the running micro-batch, R rows of one forward, D directions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.kernels.common.budget import waiting_limits
from gradent.kernels.common.numerics import in_memory_order, reduce_stacked
from gradent.kernels.common.streams import sent
from gradent.kernels.common.wanted import Wanted

__all__ = ["MaterializedRows", "Slot", "SmallGradientQueue", "row_gradients"]

Slot = tuple[int, ...]


@dataclass(frozen=True)
class MaterializedRows:
    """Gradients of one slot that were formed as they came: of R rows, `[R, *shape of the slot]`."""

    rows: Sequence[int]
    slot: Slot
    grads: Tensor


def row_gradients(parts: Sequence[MaterializedRows], count: int) -> Tensor:
    """Every row's gradient of one slot, `[N, *shape]`, zero where it has none; not to be written to."""
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
        self._waiting: dict[int, _Small] = {}
        self.held = 0
        """Bytes that wait."""

    def add(
        self, param: int, parts: Sequence[MaterializedRows], root: Tensor | None, directions: Tensor | None
    ) -> None:
        """Let a parameter wait: `parts` of one slot are all there is of it, with that slot's root and directions."""
        small = self._waiting[param] = _Small(parts, root, directions)
        self.held += small.nbytes

    def is_full(self, budget: int) -> bool:
        """Whether enough waits to be reduced now."""
        single, together = waiting_limits(budget)
        return self.held > together - single

    def reduce(self) -> dict[int, Tensor]:
        """Parameter number -> entries `[M]` of all that waits (and goes on waiting), those of one size in one call."""
        alike: dict[tuple[int, torch.dtype, torch.device], dict[int, tuple[Tensor | None, ...]]] = defaultdict(dict)
        for param, small in self._waiting.items():
            flat = small.in_memory_order(self._wanted.rows)
            assert flat[0] is not None
            alike[flat[0].shape[1], flat[0].dtype, flat[0].device][param] = flat
        entries: dict[int, Tensor] = {}
        for group in alike.values():
            grads, directions, root = zip(*group.values(), strict=True)
            reduced = reduce_stacked(
                torch.stack(grads, 1), self._wanted,
                None if directions[0] is None else torch.stack(directions, 1),
                None if root[0] is None else torch.stack(root),
            )  # fmt: skip
            entries |= dict(zip(group, reduced.unbind(), strict=True))
        return entries

    def clear(self) -> None:
        """Let go of what waits."""
        self._waiting.clear()
        self.held = 0


@dataclass(frozen=True)
class _Small:
    """What waits of a parameter."""

    parts: Sequence[MaterializedRows]
    root: Tensor | None
    directions: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(part.grads.nbytes for part in self.parts) + sum(
            tensor.nbytes for tensor in (self.root, self.directions) if tensor is not None
        )

    def in_memory_order(self, rows: int) -> tuple[Tensor | None, ...]:
        """Gradients `[N, K]`, directions `[D, K]` and root `[K]`, in one order of the K numbers."""
        grads = row_gradients(self.parts, rows)
        _, root = in_memory_order(grads, None if self.root is None else self.root[None])
        return *in_memory_order(grads, self.directions), None if root is None else root[0]
