"""Saying a thing once: a Python warning for the caller of a function, a log line beside a running trainer."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from gradent.errors import GradentWarning

__all__ = ["Notices", "log", "warn"]


def warn(text: str, *, stacklevel: int = 3) -> None:
    """Warn the caller's caller with a `GradentWarning`."""
    warnings.warn(text, GradentWarning, stacklevel=stacklevel)


def log(text: str, *, name: str = "gradent") -> None:
    """Log a warning by `name`, with gradent's name in front, and on a line of its own beside a progress bar."""
    named = text if text.startswith("gradent") else f"[gradent] {text}"
    with _beside_bars():
        logging.getLogger(name).warning("%s", named)


@contextlib.contextmanager
def _beside_bars() -> Iterator[None]:
    """Make room for a line: on a terminal progress bars are taken off and drawn anew, in a file they are ended."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    bars = [bar for bar in list(getattr(tqdm, "_instances", ())) if not getattr(bar, "disable", True)]
    shown = {id(file): file for bar in bars if _unwrapped(file := bar.fp) in (sys.stdout, sys.stderr)}.values()
    if tqdm is not None and shown and all(file.isatty() for file in shown):
        with tqdm.external_write_mode():
            yield
        return
    for file in shown:
        file.write("\n")
        file.flush()
    yield


def _unwrapped(file: Any) -> Any:
    """The stream that a bar writes to: tqdm guards it by a wrapper."""
    return getattr(file, "_wrapped", file)


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
