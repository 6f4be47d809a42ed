"""A callback must never harm the run that it observes: its errors are told, and then it steps aside."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

__all__ = ["LIMIT", "Shielded", "shielded"]

logger = logging.getLogger("gradent")

LIMIT = 3
"""Errors after which the callback leaves the run alone."""


class Shielded(Protocol):
    """What the decorator needs of the callback."""

    on_error: str
    errors: int

    def step_aside(self) -> None:
        """Take every hook off the model."""
        ...


S = TypeVar("S", bound=Shielded)


def shielded(event: Callable[..., None]) -> Callable[..., None]:
    """Decorator of an event handler: its errors are logged, not raised, unless `on_error="raise"`.

    Args:
        event: a handler of `EntanglementCallback`.

    Returns:
        The handler; once it has failed `LIMIT` times it does nothing.
    """

    @functools.wraps(event)
    def handler(self: S, *args: Any, **kwargs: Any) -> None:
        if self.errors >= LIMIT:
            return
        try:
            event(self, *args, **kwargs)
        except Exception as error:
            if self.on_error == "raise":
                raise
            self.errors += 1
            self.step_aside()
            after = "leaves the run alone from here on" if self.errors >= LIMIT else "goes on with the next step"
            logger.warning(
                "gradent failed in %s and %s; training is not affected: %s: %s",
                event.__name__, after, type(error).__name__, error, exc_info=True,
            )  # fmt: skip

    return handler
