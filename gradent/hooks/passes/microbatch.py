"""What is measured together, one forward of its rows, and what comes out.

Letters: N rows of a micro-batch, R rows of one forward, L its padded length, V words, M entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradent.kernels.common.wanted import Wanted
from gradent.model.logprobs import TILE, check_rows, sequence_logprobs

__all__ = ["Forward", "MicroBatch", "Outcome", "Row", "group_rows", "micro_batches"]

Row = tuple[Tensor, Tensor]
"""`(ids int64 [T], marks bool [T])`, without padding."""

# Tokens of one micro-batch: enough to keep the device busy, few enough that activations stay small. A GPU idles below
# some thousand tokens. Rows that keep a CPU busy by themselves (`FILLS`) gain nothing from more than `FORWARD`.
TOKENS = {"cpu": 1024, "cuda": 8192}

# Padded tokens of one forward. On a CPU, sharing one saves the calls of short rows; long rows have little to save, and
# their activations leave the caches: of caps from 0 to 1024, 512 was the best or within 4% of it with rows of up to 64,
# 192 and 512 tokens, full and LoRA (the models of benchmarks/peers.py). One row a forward costs 1.4 to 1.9 times as
# much at 64 tokens; a cap of 1024, 0.98 to 1.16 times at 192 and 1.05 to 1.1 at 512 (two runs).
FORWARD = {"cpu": 512, "cuda": 8192}

# Tokens of a row, on average, from which it keeps the device as busy by itself as with others. A Llama of 4 layers of
# width 256 under LoRA took 9% longer without sharing at rows of 48 to 96 tokens, 3% less at 64 to 128, and 10% less at
# 96 to 192 (one run of 15 rounds).
FILLS = {"cpu": 100}

WASTE = 1.15
"""Padded tokens of a forward, as a multiple of its real ones, above which rows get forwards of their own."""


@dataclass(frozen=True)
class MicroBatch:
    """What is measured together."""

    rows: Sequence[Row]  # N rows, on the model's device
    forwards: Sequence[Sequence[int]]  # rows of each forward; several rows are right-padded
    wanted: Wanted  # which products of the rows are
    names: Sequence[str]  # of the rows, for an error
    least_length: int = 0  # tokens to which every forward of several rows is padded at least
    trim: bool = False  # logits from where a forward's first response begins; for a model that `takes_keep`

    @classmethod
    def pair(cls, rows: Sequence[Row], number: int) -> MicroBatch:
        """One pair, a row a forward."""
        return cls(rows, [[0], [1]], Wanted.pairs(1), [f"pair {number}, {side}" for side in ("chosen", "rejected")])


@dataclass(frozen=True)
class Outcome:
    """Entries and log-probs of a micro-batch."""

    entries: dict[int, Tensor]  # parameter number -> `[M]` float64, as completed; none where no row depends on it
    logps: Tensor  # float64 `[N]`
    wanted: Wanted  # where the entries belong
    uncovered: dict[int, str] = field(default_factory=dict)  # parameter number -> why not


class Forward:
    """One forward of some rows of a micro-batch.

    `ids` are int64 `[R, L]`, padded on the right; logits are wanted of the last `keep` positions, of all L where it is
    0: the micro-batch is not trimmed.
    """

    def __init__(self, micro: MicroBatch, members: Sequence[int]) -> None:
        self._names = [micro.names[index] for index in members]
        rows = [micro.rows[index] for index in members]
        length = max(len(ids) for ids, _ in rows)
        if len(rows) > 1:
            length = max(length, micro.least_length)
        self.ids, self._marks = (
            torch.stack([nn.functional.pad(part, (0, length - len(part))) for part in parts])
            for parts in zip(*rows, strict=True)
        )
        self.keep = length + 1 - max(1, min(int(row.nonzero()[0]) for _, row in rows)) if micro.trim else 0

    @torch.enable_grad()
    def logps(self, logits: Tensor, budget: int) -> Tensor:
        """`log π(y|x)` of every row, float64 `[R]`, from its `logits` `[R, K, V]` in `budget` bytes of scratch."""
        kept = logits.shape[1]
        logps = sequence_logprobs(logits, self.ids[:, -kept:], self._marks[:, -kept:], tile=min(TILE, budget))
        check_rows(logps, self._names)
        return logps


def micro_batches(lengths: Sequence[Sequence[int]], device: torch.device) -> list[list[int]]:
    """Numbers of the groups of each micro-batch, from the tokens of each group's rows: similar ones, shortest first."""
    short, long = (limits.get(device.type, limits["cuda"]) for limits in (TOKENS, FORWARD))
    batches: list[list[int]] = []
    used, limit = 0, short
    for group in sorted(range(len(lengths)), key=lambda index: max(lengths[index])):
        size = len(lengths[group]) * max(lengths[group])
        own = long if _fills(lengths[group], device) else short
        if not batches or used + size > min(limit, own):
            batches.append([])
            used, limit = 0, short
        batches[-1].append(group)
        used, limit = used + size, min(limit, own)
    return batches


def group_rows(lengths: Sequence[int], device: torch.device, *, few: int = 0) -> list[list[int]]:
    """Rows of each forward, longest first, with little padding; up to `few` long rows have a forward of their own."""
    if len(lengths) <= few and _fills(lengths, device):
        return [[row] for row in range(len(lengths))]
    limit = FORWARD.get(device.type, FORWARD["cuda"])
    groups: list[list[int]] = []
    real = 0
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups:
            padded = lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            if padded <= min(limit, WASTE * (real + lengths[row])):
                groups[-1].append(row)
                real += lengths[row]
                continue
        groups.append([row])
        real = lengths[row]
    return groups


def _fills(lengths: Sequence[int], device: torch.device) -> bool:
    """Whether rows are so long that each keeps the device busy by itself; no on a GPU."""
    return device.type in FILLS and sum(lengths) >= FILLS[device.type] * len(lengths)
