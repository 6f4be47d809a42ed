"""Files that appear whole or not at all, and the directories that they go to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from gradent.errors import InputError

__all__ = ["make_directory", "write_whole"]


def make_directory(out: str | os.PathLike[str], files: Sequence[str] = ()) -> Path:
    """Make a directory and check that `files` can be written there, before any work that would be lost otherwise."""
    directory = Path(out)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made a directory ({error.strerror}). Choose another --out.") from error
    if not os.access(directory, os.W_OK):
        raise InputError(f"{out}: this directory cannot be written to. Choose another --out.")
    for name in files:
        if (directory / name).is_dir():
            raise InputError(
                f"{directory / name}: is a directory, where a file is to be written. Choose another --out."
            )
    return directory


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, flush to disk, then rename over it: no reader ever sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror}). Choose another --out directory.") from error
    finally:
        partial.unlink(missing_ok=True)
