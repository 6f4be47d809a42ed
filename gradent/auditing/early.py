"""What an audit or scan refuses at once, before torch is imported: a wrong loss, no such data or run, a lock."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from gradent.auditing.state.config import LOSS_NAMES
from gradent.auditing.state.journal import LOCK, locked
from gradent.errors import InputError
from gradent.loading.preference_files import check_exists
from gradent.loading.source import check_model_exists
from gradent.text import suggest

__all__ = ["check_early"]


def check_early(loss: object, data: str, model: str, out: Path, *, quiet: bool = False) -> None:
    """Refuse what can be told from names alone; a name that is left to the hub is told of before it is asked."""
    if isinstance(loss, str) and loss not in LOSS_NAMES:
        raise InputError(
            f"--loss {loss}: unknown loss{suggest(loss, LOSS_NAMES)} Accepted: {', '.join(LOSS_NAMES)}; "
            "in Python, losses.from_callable for any other loss."
        )
    check_exists(data)
    check_model_exists(model)
    path = out / LOCK
    if path.is_file() and os.environ.get("RANK", "0") == "0":
        try:
            with FileLock(path).acquire(timeout=0):
                pass
        except Timeout:
            raise InputError(locked(out)) from None
        except OSError:  # told of with its remedy when the lock is taken
            return
    if not quiet and not Path(model).exists():
        sys.stderr.write(f"note: there is no directory {model} here; it is looked for on the hub.\n")
