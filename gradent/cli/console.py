"""How a command speaks to its terminal: results on stdout, readable errors on stderr, silence from other libraries."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from gradent.errors import GradentError

__all__ = ["readable_errors", "say"]


def say(text: str) -> None:
    """Print a line that is not wrapped, so that paths can be copied."""
    Console(highlight=False).print(Text(text), soft_wrap=True)


@contextmanager
def readable_errors(*, loads_models: bool = True) -> Iterator[None]:
    """One block on stderr and exit code 2 for what the user can put right; 130 for Ctrl-C."""
    console = Console(stderr=True, highlight=False)
    try:
        if loads_models:
            _quieten_others()
        yield
    except GradentError as error:
        from gradent.text import printable  # noqa: PLC0415

        lines = printable(str(error)).replace("\n", "\n  ")
        console.print(Text("error", "bold red"), Text(f"({type(error).__name__})\n  {lines}"), soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        console.print(Text(f"interrupted: {str(error) or 'nothing more was written'}"), soft_wrap=True)
        raise typer.Exit(130) from error


def _quieten_others() -> None:
    """No loading bars and advice between the tables: what matters of them, `gradent.loading.models` checks itself."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other libraries about each other
    warnings.filterwarnings("ignore", "Found missing adapter keys")
    from transformers.utils import logging  # noqa: PLC0415  (slow, and not needed by every command)

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
