"""What is measured together, one forward of its rows, and what comes out.

Letters: k pairs of a micro-batch, rows 0..k-1 chosen and k..2k-1 rejected; R rows of one forward, L its padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradent.model.calls import forward_logits
from gradent.model.logprobs import TILE, check_logps, sequence_logprobs

__all__ = ["Forward", "MicroBatch", "Outcome"]


@dataclass(frozen=True)
class MicroBatch:
    """What is measured together.

    Attributes:
        rows: `(ids int64 [T], marks bool [T])` of 2k rows, on the model's device, unpadded.
        groups: rows of each forward; a group of several rows is right-padded.
        pairs: the k pairs' numbers, as an error names them.
        least_length: pad every group to at least this many tokens.
        trim: ask the model for the logits of responses alone, from where the first one of a group begins. Only for a
            model that `takes_keep`.
    """

    rows: Sequence[tuple[Tensor, Tensor]]
    groups: Sequence[Sequence[int]]
    pairs: Sequence[int]
    least_length: int = 0
    trim: bool = False


@dataclass(frozen=True)
class Outcome:
    """Gram entries and log-probs of a micro-batch.

    Attributes:
        entries: parameter number -> `[k, 3]` float64; a parameter that no row depends on is absent (its gradient is 0).
            In the order of the backward pass.
        logps: float64 `[2k]`.
        uncovered: parameter number -> why it could not be measured within the budget.
    """

    entries: dict[int, Tensor]
    logps: Tensor
    uncovered: dict[int, str]


class Forward:
    """One forward of some rows of a micro-batch.

    Args:
        micro: the micro-batch.
        group: row numbers.

    Attributes:
        ids: int64 `[R, L]`, padded on the right.
    """

    def __init__(self, micro: MicroBatch, group: Sequence[int]) -> None:
        self._micro, self._group = micro, group
        rows = [micro.rows[index] for index in group]
        length = max(len(ids) for ids, _ in rows)
        if len(rows) > 1:
            length = max(length, micro.least_length)
        self.ids, self._marks = (
            torch.stack([_pad(part, length) for part in parts]) for parts in zip(*rows, strict=True)
        )
        self._keep = length + 1 - max(1, min(int(row.nonzero()[0]) for _, row in rows)) if micro.trim else 0

    @torch.enable_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """`[R, K, V]` of the last K positions, all L of them unless the micro-batch is trimmed."""
        return forward_logits(model, self.ids, keep=self._keep)

    @torch.enable_grad()
    def logps(self, logits: Tensor, budget: int) -> Tensor:
        """`log π(y|x)` of every row.

        Args:
            logits: what `logits` gave.
            budget: bytes of scratch.

        Returns:
            float64 `[R]`.

        Raises:
            NonFiniteError: a log-prob is nan or infinite.
        """
        kept = logits.shape[1]
        logps = sequence_logprobs(logits, self.ids[:, -kept:], self._marks[:, -kept:], tile=min(TILE, budget))
        half = len(self._micro.rows) // 2
        check_logps(logps, [self._micro.pairs[row % half] for row in self._group], [row < half for row in self._group])
        return logps


def _pad(values: Tensor, length: int) -> Tensor:
    return nn.functional.pad(values, (0, length - len(values)))
