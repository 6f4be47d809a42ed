"""Bytes that reductions may take: the user's `memory_budget`, and what of it is left to tiles."""

from __future__ import annotations

import re

from gradent.errors import MemoryBudgetError

__all__ = ["BATCH", "DEFAULT_BUDGET", "batch_room", "least_budget", "parse_budget", "tile_room", "waiting_limits"]

DEFAULT_BUDGET = 256 * 2**20
"""Scratch of the reductions, in bytes, where the user sets none: a few tiles that stay near the caches."""

SUMS = 2**18
"""Bytes that the sums of a tile take at most: one number for each product and run, or two for each of its rows."""

BATCH = 4 * 2**20
"""Bytes of scratch up to which a CPU takes all rows of a batch at once: calls cost more than sums there. Beyond, one
buffer that is used again for every group stays in the caches."""

SMALL = 512 * 2**10
"""Bytes of a parameter's gradients, of all rows, up to which it waits for others: more calls than sums."""

HELD = 8 * 2**20
"""Bytes of such gradients that are held at once."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def tile_room(budget: int) -> int:
    """Bytes of a budget that tiles may take: a 64th of it, 256 KiB at most, is left to their sums."""
    return budget - min(SUMS, budget // 64)


def least_budget(budget: int, rows: int) -> int:
    """A budget, or what the smallest tiles of so many rows take where that is more."""
    return max(budget, 64 * (rows + 2))


def batch_room(budget: int, device: str) -> int:
    """Bytes that the gradients of all rows may take at once on a type of device."""
    return min(tile_room(budget), BATCH) if device == "cpu" else tile_room(budget)


def waiting_limits(budget: int) -> tuple[int, int]:
    """Bytes of one parameter's gradients that may wait for others, and of all that wait; both are copied."""
    return min(SMALL, budget // 4), min(HELD, budget // 4)


def parse_budget(value: int | str | None) -> int | None:
    """A user's `memory_budget` in bytes, from an int or a string such as "512MiB", "2 GB" or "65536"; None for None."""
    if value is None:
        return None
    size: float | None = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", value, re.IGNORECASE)
        if match and match[2].lower() in _UNITS:
            size = float(match[1]) * _UNITS[match[2].lower()]
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size is None or size < 1:
        raise MemoryBudgetError(
            f"memory_budget={value!r} is not a size. Accepted: a positive number of bytes, or a string such as "
            "'512MiB', '2GiB', '800MB'; None for the default."
        )
    return int(size)
