"""What the user sees while an audit works, on stderr: progress bars, and notes that go into the record too."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from gradent.errors import GradentWarning
from gradent.text import printable

__all__ = ["make_tell", "pair_progress", "warnings_as_notes"]


@contextmanager
def pair_progress(label: str, pairs: int, cost: int, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over the cost of pairs, on a terminal only; yields a function that takes pairs done and their cost."""
    console = Console(stderr=True)
    columns = (
        TextColumn(label), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[done]}/{task.fields[pairs]} pairs"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=cost, done=0, pairs=pairs)

        def advance(count: int, part: int) -> None:
            progress.update(task, advance=part, done=progress.tasks[task].fields["done"] + count)

        yield advance


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
