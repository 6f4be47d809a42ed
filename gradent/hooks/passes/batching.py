"""Which pairs are measured together, and which of their rows share a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["group_rows", "micro_batches"]

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


def micro_batches(lengths: Sequence[tuple[int, int]], device: torch.device) -> list[list[int]]:
    """Split pairs into micro-batches of similar length.

    Args:
        lengths: tokens of the chosen and of the rejected row of each pair.
        device: where the model runs.

    Returns:
        Pair numbers of each micro-batch, shortest pairs first; every pair once.
    """
    short, long = (limits.get(device.type, limits["cuda"]) for limits in (TOKENS, FORWARD))
    batches: list[list[int]] = []
    used, limit = 0, short
    for pair in sorted(range(len(lengths)), key=lambda index: max(lengths[index])):
        size = 2 * max(lengths[pair])
        own = long if _fill(lengths[pair], device) else short
        if not batches or used + size > min(limit, own):
            batches.append([])
            used, limit = 0, short
        batches[-1].append(pair)
        used, limit = used + size, min(limit, own)
    return batches


def group_rows(lengths: Sequence[int], device: torch.device, *, few: int = 0) -> list[list[int]]:
    """Split the rows of a micro-batch into forwards.

    Args:
        lengths: real tokens of each row.
        device: where the model runs.
        few: rows up to which a forward of its own for each costs nothing but its calls (`plain_rows`).

    Returns:
        Row numbers of each forward: longest rows first, padded to their longest, with little padding; every row once.
        Up to `few` rows, if they are long, have a forward of their own in their order.
    """
    if len(lengths) <= few and _fill(lengths, device):
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


def _fill(lengths: Sequence[int], device: torch.device) -> bool:
    """Whether rows are so long that each keeps the device busy by itself; no on a GPU."""
    return device.type in FILLS and sum(lengths) >= FILLS[device.type] * len(lengths)
