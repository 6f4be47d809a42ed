"""Gradients that were formed as they came, and the small ones of many parameters, which a few calls reduce.

A bias, a norm or a LoRA factor has so small a gradient that the calls which reduce it cost more than its sums: it waits
for others of its size.

Letters: k pairs of the running micro-batch, rows 0..k-1 chosen and k..2k-1 rejected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.kernels.common.numerics import in_memory_order, reduce_tiles
from gradent.kernels.common.streams import sent

__all__ = ["HELD", "Formed", "Slot", "SmallGradients", "is_small", "most_held", "row_gradients"]

SMALL = 512 * 2**10
"""Bytes of a parameter's gradients, of all rows, up to which it waits for others."""

HELD = 8 * 2**20
"""Bytes of such gradients that are held at once."""

Slot = tuple[int, ...]


@dataclass(frozen=True)
class Formed:
    """Gradients of one slot that were formed as they came: rows R, `[R, *shape of the slot]`."""

    rows: Sequence[int]
    slot: Slot
    grads: Tensor


def is_small(size: int, budget: int) -> bool:
    """Whether a parameter's gradients wait for others to be reduced with.

    Args:
        size: bytes of all rows' gradients.
        budget: bytes of scratch; what waits takes a quarter of it at most, and up to three copies while it is reduced.

    Returns:
        The answer.
    """
    return size <= min(SMALL, budget // 4)


def most_held(budget: int) -> int:
    """Bytes of gradients that wait at once, at most; `budget` as for `is_small`."""
    return min(HELD, budget // 4)


def row_gradients(formed: Sequence[Formed], count: int, root: Tensor | None) -> Tensor:
    """Every row's gradient of one slot, as the metric sees it.

    Args:
        formed: of one slot; at least one.
        count: rows of the micro-batch, 2k.
        root: square root of the metric's diagonal, of the slot's shape; None for the Euclidean metric.

    Returns:
        `[2k, *shape of the slot]`: added where a row has several, zero where it has none. Not to be written to.
    """
    grads = _in_order(formed, count)
    return grads if root is None else grads * root


def _in_order(formed: Sequence[Formed], count: int) -> Tensor:
    formed = sorted(formed, key=lambda one: min(one.rows))
    rows = [row for one in formed for row in one.rows]
    first, at = formed[0].grads, torch.tensor(rows)
    if sorted(rows) == list(range(count)):
        grads = first if len(formed) == 1 else torch.cat([one.grads for one in formed])
        return grads if rows == list(range(count)) else grads[sent(at.argsort(), grads.device)]
    at = sent(at, first.device)
    tiles = first.new_zeros(count, *first.shape[1:])
    for one, where in zip(formed, torch.split(at, [len(one.rows) for one in formed]), strict=True):
        tiles.index_add_(0, where, one.grads)
    return tiles


class SmallGradients:
    """Parameters that wait to be reduced together.

    Args:
        pairs: k.
    """

    def __init__(self, pairs: int) -> None:
        self._rows = 2 * pairs
        self._held: dict[int, Sequence[Formed]] = {}
        self._bytes = 0

    @property
    def held(self) -> int:
        """Bytes that wait."""
        return self._bytes

    def add(self, param: int, formed: Sequence[Formed]) -> None:
        """Let a parameter wait.

        Args:
            param: its number.
            formed: all there is of it, of one slot.
        """
        self._held[param] = formed
        self._bytes += sum(one.grads.nbytes for one in formed)

    def full(self, budget: int) -> bool:
        """Whether enough waits to be reduced now; `budget` as for `is_small`."""
        return self._bytes > most_held(budget) - min(SMALL, budget // 4)

    def reduce(self, root: Callable[[int, Slot], Tensor | None]) -> dict[int, Tensor]:
        """Reduce what waits, parameters of one size in one call. They still wait afterwards, until `clear`.

        Args:
            root: parameter number, slot -> square root of the metric's diagonal there, or None.

        Returns:
            Parameter number -> `[k, 3]` float64.
        """
        alike: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
        for param, formed in self._held.items():
            grads = formed[0].grads
            alike[grads[0].numel(), grads.dtype, grads.device].append(param)
        entries: dict[int, Tensor] = {}
        for params in alike.values():
            stacked = torch.stack([self._gradients(param, root) for param in params], 1)  # [2k, parameters, numbers]
            found = reduce_tiles(stacked.flatten(0, 1)).view(self._rows // 2, len(params), 3)
            entries |= dict(zip(params, found.unbind(1), strict=True))
        return entries

    def clear(self) -> None:
        """Let go of what waits."""
        self._held.clear()
        self._bytes = 0

    def _gradients(self, param: int, root: Callable[[int, Slot], Tensor | None]) -> Tensor:
        formed = self._held[param]
        return in_memory_order(row_gradients(formed, self._rows, root(param, formed[0].slot)))
