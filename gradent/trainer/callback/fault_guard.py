"""A callback must never harm the run that it observes: its errors are told, and then it steps aside."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from gradent.errors import GradentError

__all__ = ["LIMIT", "Shielded", "shielded"]

logger = logging.getLogger("gradent")

LIMIT = 3
"""Errors after which the callback leaves the run alone."""


class Shielded(Protocol):
    """What the decorator needs of the callback."""

    on_error: str
    errors: int
    told: set[str]

    def step_aside(self) -> None:
        """Take every hook off the model."""
        ...


S = TypeVar("S", bound=Shielded)


def shielded(event: Callable[..., None]) -> Callable[..., None]:
    """Decorator of an event handler: its errors are logged, not raised, unless `on_error="raise"`.

    An error is told once; the handler goes on being called, and is to look at `errors` itself, since on several ranks
    some handlers have an appointment with the other ranks to keep.

    Args:
        event: a handler of `EntanglementCallback`.

    Returns:
        The handler.
    """

    @functools.wraps(event)
    def handler(self: S, *args: Any, **kwargs: Any) -> None:
        try:
            event(self, *args, **kwargs)
        except Exception as error:
            if self.on_error == "raise":
                self.step_aside()
                raise
            self.errors += 1
            self.step_aside()
            _tell(self, event.__name__, error)

    return handler


def _tell(self: Shielded, event: str, error: Exception) -> None:
    what = f"{type(error).__name__}: {error}"
    if what not in self.told:
        self.told.add(what)
        own = isinstance(error, GradentError)  # says itself what to do
        logger.warning(
            "gradent failed in %s, and training is not affected: %s%s",
            event,
            what,
            "" if own else f" {_remedy(error)}",
            exc_info=None if own else error,
        )
    if self.errors == LIMIT:
        logger.warning("gradent has failed %d times and leaves this run alone from here on.", LIMIT)


def _remedy(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "-- Give EntanglementCallback a smaller memory_budget, or train in smaller, accumulated batches."
    return "-- EntanglementCallback(on_error='raise') stops here instead; mode='measure' measures in another way."
