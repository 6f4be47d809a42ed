"""What a step's rows are to one another, by which pushes are split into sources.

Letters: N rows, M rows that push them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.hooks.piggyback.observation import BackwardObservation
from gradent.record import GROUP_SOURCES, MOVED_SOURCES

__all__ = ["Roles"]


@dataclass(frozen=True, eq=False)
class Roles:
    """Pairs, all chosen rows and then all rejected ones, or rows in groups."""

    sides: int  # 2 of pairs, 1 of groups
    group: Tensor  # rows of one pair, or of one group, share a number: int64 [N]
    is_positive: Tensor  # rows that the loss raises; of pairs the chosen ones: bool [N]

    @classmethod
    def of(cls, observation: BackwardObservation) -> Roles:
        """The roles of a backward's rows."""
        return cls.by_coefficients(observation.sides, observation.group, observation.c)

    @classmethod
    def by_coefficients(cls, sides: int, group: Tensor, c: Tensor) -> Roles:
        """The roles of rows in these groups int64 `[N]`, with coefficients `[N]`."""
        if sides == 1:
            return cls(1, group, c < 0)
        pairs = len(c) // 2
        return cls(2, torch.arange(pairs).repeat(2), torch.arange(2 * pairs) < pairs)

    @property
    def sources(self) -> tuple[str, ...]:
        """All sources, in the order of tables and panels."""
        return MOVED_SOURCES if self.sides == 2 else GROUP_SOURCES

    def split(self, pushes: Tensor, by: Roles | None = None) -> dict[str, Tensor]:
        """Source -> `[N]`, the sums of pushes `[N, M]` by rows of the same backwards, or by those of others."""
        one, other = self.group[:, None], (self if by is None else by).group
        same = torch.eye(*pushes.shape, dtype=torch.bool) if by is None else torch.zeros_like(pushes, dtype=torch.bool)
        # A pair's two rows are in one backward.
        together = (one == other) & ~same if by is None or self.sides == 1 else same
        is_positive = (self if by is None else by).is_positive.expand_as(together)
        apart = ~together & ~same
        if self.sides == 2:
            parts = {
                "own": same, "partner": together, "others_chosen": apart & is_positive,
                "others_rejected": apart & ~is_positive,
            }  # fmt: skip
        else:
            parts = {
                "own": same, "positives": together & is_positive, "negatives": together & ~is_positive,
                "other_groups": apart,
            }  # fmt: skip
        return {source: pushes.where(part, 0.0).sum(1) for source, part in parts.items()}
