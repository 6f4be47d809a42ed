"""What is made once a session, whichever test process asks first: the others wait for it and read it."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from filelock import FileLock

__all__ = ["folder_once", "remember_session", "value_once"]

_T = TypeVar("_T")
_SESSION: list[Path] = []


def remember_session(factory: pytest.TempPathFactory) -> None:
    """Where this session's processes keep what they share; called once a process, by tests/conftest.py."""
    own = factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    _SESSION[:] = [root / "shared"]
    _SESSION[0].mkdir(exist_ok=True)


def folder_once(key: Any, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills, made once for each key (by its `repr`). It is not to be written into."""
    (session,) = _SESSION
    folder = session / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            # Made at its final place, for paths are written into files; what fails halfway is made again.
            try:
                make(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    return folder


def value_once(key: Any, make: Callable[[], _T]) -> _T:
    """What `make` returns, pickled: made once for each key."""

    def write(folder: Path) -> None:
        value = make()
        folder.mkdir()
        (folder / "value.pickle").write_bytes(pickle.dumps(value))

    return pickle.loads((folder_once(key, write) / "value.pickle").read_bytes())
