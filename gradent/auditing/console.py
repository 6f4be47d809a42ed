"""The bars of an audit, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["pair_progress"]


@contextmanager
def pair_progress(doing: str, pairs: int, cost: int, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over what pairs cost, since that goes with their length, with the pairs counted beside it.

    Args:
        doing: what is being done, in a word.
        pairs: how many pairs there are.
        cost: of all of them together, in any unit (tokens, say).
        quiet: show nothing; nor is anything shown where stderr is no terminal.

    Yields:
        A function to call with the pairs that are done since the last call and their cost.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn(doing),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[done]}/{task.fields[pairs]} pairs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=cost, done=0, pairs=pairs)

        def advance(count: int, part: int) -> None:
            progress.update(task, advance=part, done=progress.tasks[task].fields["done"] + count)

        yield advance
