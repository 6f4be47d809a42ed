"""What is said to the user on the way: notes on stderr, which go into the record too."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from gradent.errors import GradentWarning
from gradent.text import printable

__all__ = ["teller", "warnings_told"]


def teller(notes: list[str], quiet: bool) -> Callable[[str], None]:
    """A function that says a note on stderr and keeps it.

    Args:
        notes: where it is kept.
        quiet: keep it only.

    Returns:
        The function.
    """
    console = Console(stderr=True, quiet=quiet)

    def tell(note: str) -> None:
        notes.append(note)
        console.print(Text(f"note: {printable(note)}"), soft_wrap=True)

    return tell


@contextmanager
def warnings_told(tell: Callable[[str], None]) -> Iterator[None]:
    """What gradent warns of belongs to the record; other warnings go their way.

    Args:
        tell: takes a warning's text.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, GradentWarning):
                tell(str(message))
            else:
                shown(message, category, *place, **more)

        warnings.simplefilter("always", GradentWarning)
        warnings.showwarning = show
        yield
