"""An audit in one process, or in several that a launcher (`accelerate launch`, `torchrun`) started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gradent.errors import InputError

__all__ = ["Ranks", "join", "only_audit"]

_LOCK = "journal/lock"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which process this is.

    Attributes:
        rank: of this process, from 0.
        world: how many there are.
        local: rank on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the records."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.world > 1:
            from accelerate import PartialState  # noqa: PLC0415

            PartialState().wait_for_everyone()

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all ranks in one list; every rank must call it.

        Args:
            values: picklable.

        Returns:
            All of them, rank by rank.
        """
        if self.world == 1:
            return values
        from accelerate.utils import gather_object  # noqa: PLC0415

        return list(gather_object(values))

    def share(self, count: int) -> range:
        """The part of `range(count)` that is this rank's: every `world`-th, from its own number on."""
        return range(self.rank, count, self.world)


def join(device: str | None) -> Ranks:
    """Meet the other processes of this audit, if a launcher started any.

    Args:
        device: what the user asked for; "cpu" keeps the meeting off the GPUs.

    Returns:
        Which process this is.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    from accelerate import PartialState  # noqa: PLC0415

    state = PartialState(cpu=device == "cpu" or _without_gpu())
    return Ranks(rank=state.process_index, world=state.num_processes, local=state.local_process_index)


@contextmanager
def only_audit(directory: Path, ranks: Ranks) -> Iterator[None]:
    """Keep a second audit out of a directory.

    Args:
        directory: where the records go.
        ranks: the first of them holds the lock for all.

    Yields:
        Nothing.

    Raises:
        InputError: another audit is at work there.
    """
    lock, refused = FileLock(directory / _LOCK), list[str]()
    if ranks.first:
        try:
            (directory / _LOCK).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            refused.append(
                f"{directory}: another audit is writing there now. Wait for it to end, stop it, or choose another "
                "--out."
            )
        except OSError as error:
            refused.append(f"{directory / _LOCK}: cannot be locked ({error.strerror}). Choose another --out.")
    refused = ranks.gather(refused)  # no rank opens a journal that the first may not have
    if refused:
        raise InputError(refused[0])
    try:
        yield
    finally:
        lock.release()


def _without_gpu() -> bool:
    import torch  # noqa: PLC0415

    return not torch.cuda.is_available()
