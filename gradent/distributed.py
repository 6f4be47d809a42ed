"""Several processes of one run or audit, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "current_rank", "gather", "is_first", "join", "world_size"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which process this is, and how it meets the others; the defaults are those of a process by itself."""

    rank: int = 0
    world: int = 1
    local: int = 0  # rank on this machine

    @property
    def is_first(self) -> bool:
        """Whether this process writes the records."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.world > 1:
            dist.barrier()

    def gather(self, values: list[T]) -> list[T]:
        """The values of all ranks in one list, rank by rank, on every rank; each of them must call it."""
        if self.world == 1:
            return values
        parts: list[list[T]] = [[]] * self.world
        # all_gather rather than gather: NCCL has no gather of objects to one rank on every version.
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors of one shape over all ranks, in place; each of them must call it."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)

    def share(self, count: int) -> range:
        """This rank's part of `range(count)`: every `world`-th number, from its own on."""
        return range(self.rank, count, self.world)


def join(device: str | None) -> Ranks:
    """Join the process group, if a launcher started one; with device "cpu" its messages stay off the GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    from accelerate import PartialState  # noqa: PLC0415  (not needed by a process by itself)

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return Ranks(rank=state.process_index, world=state.num_processes, local=state.local_process_index)


def _current() -> Ranks:
    """The ranks of the process group that a trainer has joined."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(rank=dist.get_rank(), world=dist.get_world_size())


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return _current().is_first


def current_rank() -> int:
    """This process's number among those that train together."""
    return _current().rank


def world_size() -> int:
    """How many processes train together."""
    return _current().world


def gather(value: T) -> list[T]:
    """The values of all ranks on rank 0, an empty list elsewhere; every rank must call it, even after a failure."""
    ranks = _current()
    values = ranks.gather([value])
    return values if ranks.is_first else []
