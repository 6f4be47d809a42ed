"""What the user sees while an audit works, on stderr: progress bars, and notes that go into the record too."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from gradent.errors import GradentWarning
from gradent.text import printable

__all__ = ["LINE_EVERY", "make_tell", "pair_progress", "warnings_as_notes"]

LINE_EVERY = 60.0
"""Seconds between two lines of progress where there is no terminal."""


@contextmanager
def pair_progress(label: str, pairs: int, cost: int, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over the cost of pairs, or a line every minute where there is no terminal; yields what to tell of both."""
    console = Console(stderr=True)
    lines = None if quiet or console.is_terminal else _ProgressLines(label, pairs, cost, console)
    columns = (
        TextColumn(label), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[done]}/{task.fields[pairs]} pairs"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=cost, done=0, pairs=pairs)

        def advance(count: int, part: int) -> None:
            progress.update(task, advance=part, done=progress.tasks[task].fields["done"] + count)
            if lines is not None:
                lines.advance(count, part)

        yield advance


class _ProgressLines:
    """Progress for a log file: a line a minute."""

    def __init__(self, label: str, pairs: int, cost: int, console: Console) -> None:
        self._label, self._pairs, self._cost, self._console = label, pairs, cost, console
        self._begun = self._told = time.monotonic()
        self._done = self._part = 0

    def advance(self, count: int, part: int) -> None:
        self._done, self._part = self._done + count, self._part + part
        now = time.monotonic()
        if now - self._told < LINE_EVERY or self._done >= self._pairs or not self._part:
            return
        self._told, spent = now, now - self._begun
        left = spent * max(0, self._cost - self._part) / self._part
        told = f"{self._label}: {self._done}/{self._pairs} pairs in {_clock(spent)}, about {_clock(left)} left"
        self._console.print(Text(told), soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def make_tell(notes: list[str], quiet: bool) -> Callable[[str], None]:
    """A function that keeps a note and, unless quiet, prints it."""
    console = Console(stderr=True, quiet=quiet)

    def tell(note: str) -> None:
        notes.append(note)
        console.print(Text(f"note: {printable(note)}"), soft_wrap=True)

    return tell


@contextmanager
def warnings_as_notes(tell: Callable[[str], None]) -> Iterator[None]:
    """Pass every `GradentWarning` to `tell`, since it belongs to the record; other warnings are shown as usual."""
    with warnings.catch_warnings():
        show_usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if issubclass(category, GradentWarning):
                tell(str(message))
            else:
                show_usual(message, category, *place, **options)

        warnings.simplefilter("always", GradentWarning)
        warnings.showwarning = show
        yield
