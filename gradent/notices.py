"""Saying a thing once: a Python warning for the caller of a function, a log line beside a running trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable

from gradent.errors import GradentWarning

__all__ = ["Notices", "log", "warn"]

logger = logging.getLogger("gradent")


def warn(text: str, *, stacklevel: int = 3) -> None:
    """Warn the caller's caller with a `GradentWarning`."""
    warnings.warn(text, GradentWarning, stacklevel=stacklevel)


def log(text: str) -> None:
    """Log a warning as `gradent`."""
    logger.warning("%s", text)


class Notices:
    """What has been said already, by key; `say` takes a text that is new."""

    def __init__(self, say: Callable[[str], None] = log) -> None:
        self._say = say
        self._keys: set[Hashable] = set()

    def once(self, text: str, *, key: Hashable = None) -> bool:
        """Say a text unless its key (by default the text) was said before; whether it was said now."""
        key = text if key is None else key
        if key in self._keys:
            return False
        self._keys.add(key)
        self._say(text)
        return True

    def clear(self) -> None:
        """Forget what was said."""
        self._keys.clear()
