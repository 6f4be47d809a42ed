"""What keeps an error of gradent's own away from the training run that it watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradent.hooks.overhead import Clock

__all__ = ["Guard", "private_backward"]

_OUT_OF_MEMORY = (
    "memory ran out, also with tiles of a quarter of memory_budget; give gradent a smaller memory_budget, or measure "
    "fewer pairs at once (a smaller batch, accumulated)"
)


class Guard:
    """Runs parts of the watching of one backward, and keeps their errors as reasons instead of raising them."""

    def __init__(self, clock: Clock, on_out_of_memory: Callable[[], None]) -> None:
        self.clock = clock  # counts the time of these parts
        self.no_entries_reason: str | None = None  # why this backward has no Gram entries; None while it has
        self.unusable_reason: str | None = None  # why not even the coefficients can be used; None while they can
        self._on_out_of_memory = on_out_of_memory

    def guarded(self, function: Callable[..., None], *args: Any) -> None:
        """Run a function, unless the backward that runs now is a private one of somebody else."""
        if _private and self is not _private[-1]:
            return
        try:
            with self.clock:
                function(*args)
        except Exception as error:  # noqa: BLE001  (whatever it is, the training run must go on as if unobserved)
            self.keep_error(error)

    def keep_error(self, error: Exception) -> None:
        """Turn an error into a reason."""
        self.fail(f"gradent's own {type(error).__name__}: {error}")
        if isinstance(error, torch.OutOfMemoryError):  # a pass of gradent's own would need more memory still
            self.break_off(_OUT_OF_MEMORY)
            self._on_out_of_memory()

    def fail(self, reason: str) -> None:
        """Give up the entries; the first reason stands."""
        if self.no_entries_reason is None:
            self.no_entries_reason = reason

    def break_off(self, reason: str) -> None:
        """Give up the backward, coefficients too; the first reason stands."""
        self.fail(reason)
        if self.unusable_reason is None:
            self.unusable_reason = reason


_private: list[Guard | None] = []
"""Whose backward runs now, innermost last; not context-local, since autograd has threads of its own."""


@contextmanager
def private_backward(guard: Guard | None) -> Iterator[None]:
    """Inside, a backward of gradent's own runs on a trainer's graph: only this guard's hooks see it, or nobody's."""
    _private.append(guard)
    try:
        yield
    finally:
        _private.pop()
