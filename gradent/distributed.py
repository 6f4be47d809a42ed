"""Several processes, one record: the pairs of all ranks are gathered on rank 0."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

__all__ = ["gather", "is_first"]

T = TypeVar("T")


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return not _several() or dist.get_rank() == 0


def gather(value: T) -> list[T]:
    """Collect a value from every rank. Every rank must call it, whatever happened to it before.

    Args:
        value: anything that can be pickled.

    Returns:
        On rank 0 the values of all ranks, in their order; elsewhere an empty list.
    """
    if not _several():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    # all_gather rather than gather: NCCL has no gather of objects to one rank on every version.
    dist.all_gather_object(values, value)
    return [one for one in values if one is not None] if dist.get_rank() == 0 else []
