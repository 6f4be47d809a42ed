"""What an audit has measured so far: one JSON line a finding, on disk before the next is begun, read after a crash.

A journal is known by a key, which stands for everything that its numbers depend on. Each rank of an audit appends to a
file of its own, `DIR/journal/KEY-RANK.jsonl`, and reads those of all. An audit with another key begins another journal;
the old one stays where it is, so that going back to the old settings goes on where they were left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from gradent.errors import InputError
from gradent.record.atomic import write_whole
from gradent.record.json_lines import JsonLines, LineFormat, read_lines

if TYPE_CHECKING:
    from gradent.distributed import Ranks

__all__ = ["LOCK", "Journal", "JournalError", "locked", "only_audit"]

_FORMAT = LineFormat(
    schema="gradent.audit_journal", noun="a journal of an audit", keys=frozenset({"kind", "of", "number", "content"}),
    remedy="Remove the file to measure its part anew, and run the same command again.",
)  # fmt: skip


class JournalError(InputError):
    """Findings cannot be written down: the audit must stop, whatever else could still be measured."""


class Journal:
    """Findings by kind, subject and number (of a batch, say): appended to this rank's file and kept in memory."""

    def __init__(self, directory: Path, key: str, rank: int = 0) -> None:
        self._folder, self._key = directory / "journal", key
        self.path = self._folder / f"{key}-{rank}.jsonl"
        self._findings: dict[tuple[str, str, int], dict[str, Any]] = {}
        try:
            self._lines = JsonLines(self.path, _FORMAT)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}). Choose another --out.") from error
        self.refresh()

    def refresh(self) -> None:
        """Read what all ranks have written by now."""
        for path in sorted(self._folder.glob(f"{self._key}-*.jsonl")):
            for entry in read_lines(path, _FORMAT):
                self._findings[entry["kind"], entry["of"], entry["number"]] = entry["content"]

    def find(self, kind: str, of: str, number: int = 0) -> dict[str, Any] | None:
        """A finding, or None where it has not been made, or the file of its array has gone."""
        found = self._findings.get((kind, of, number))
        return None if found is not None and "file" in found and not (self._folder / found["file"]).is_file() else found

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Every finding of a kind, in the order in which they were read or made."""
        return [content for (name, _, _), content in self._findings.items() if name == kind]

    def append(self, kind: str, of: str, number: int, content: Mapping[str, Any]) -> None:
        """Write a finding to disk; when this returns, no crash can lose it."""
        finding = dict(content)
        try:
            self._lines.append([{"kind": kind, "of": of, "number": number, "content": finding}], sync=True)
        except OSError as error:
            raise JournalError(
                f"{self.path}: cannot be written ({error.strerror}). What was measured before is kept: make room and "
                "run the same command again."
            ) from error
        self._findings[kind, of, number] = finding

    def save(self, name: str, values: NDArray[Any]) -> str:
        """Write an array to a file of its own; returns the file's name, which `load` takes."""
        path = self._folder / f"{self._key}-{name}.npy"
        try:
            write_whole(path, lambda handle: np.save(handle, values))
        except InputError as error:
            raise JournalError(str(error)) from error
        return path.name

    def load(self, name: str) -> NDArray[Any]:
        """An array that `save` wrote."""
        path = self._folder / name
        try:
            values: NDArray[Any] = np.load(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}). Remove the file to measure its part anew, and run the same command "
                "again."
            ) from error
        return values

    def keeping(self, tell: Callable[[str], None]) -> Callable[[str], None]:
        """A `tell` of notes on measuring: part of the record, even where another process did this part of it."""

        def tell_and_keep(note: str) -> None:
            if self.find("note", note) is None:
                self.append("note", note, 0, {"text": note})
                tell(note)

        return tell_and_keep

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


LOCK = "journal/lock"
"""What an audit holds while it writes to a directory."""


def locked(directory: Path) -> str:
    """That another audit, or a scan, holds a directory."""
    return f"{directory}: another audit or scan is writing there now. Wait, stop it, or choose another --out."


@contextmanager
def only_audit(directory: Path, ranks: Ranks) -> Iterator[None]:
    """Keep a second audit out of a directory; the first rank holds the lock for all."""
    path = directory / LOCK
    lock, refusals = FileLock(path), list[str]()
    if ranks.is_first:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            refusals.append(locked(directory))
        except OSError as error:
            refusals.append(f"{path}: cannot be locked ({error.strerror}). Choose another --out.")
    refusals = ranks.gather(refusals)  # no rank opens a journal that the first may not have
    if refusals:
        raise InputError(refusals[0])
    try:
        yield
    finally:
        lock.release()
