"""What an audit has measured so far: one JSON line a finding, on disk before the next is begun, read after a crash.

A journal is known by a key, which stands for everything that its numbers hang on. Each rank of an audit appends to a
file of its own, `DIR/journal/KEY-RANK.jsonl`, and reads those of all. An audit with another key begins another journal;
the old one stays where it is, so that going back to the old settings goes on where they were left.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradent.errors import DataFileError, InputError
from gradent.record.parquet import SCHEMA_VERSION, check_version
from gradent.version import __version__

__all__ = ["Journal", "JournalError", "Key", "digest"]

_SCHEMA = "gradent.audit_journal"
Key = tuple[str, str, int]
"""Kind of finding, what it is about, and a number: a batch, say."""


class JournalError(InputError):
    """Findings cannot be written down: the audit must stop, whatever else could still be measured."""


def digest(content: Any) -> str:
    """A short name for a JSON value: the same for the same value, in every process.

    Args:
        content: anything that `json.dumps` takes.

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """Findings by key, appended to a file and kept in memory.

    Args:
        directory: the audit's directory; the journal goes into `journal/` there.
        key: stands for the settings, as `digest` makes it.
        rank: of this process; it alone writes to its file.

    Raises:
        InputError: the file cannot be written.
        DataFileError: a file of this key is damaged before its last line.
    """

    def __init__(self, directory: Path, key: str, rank: int = 0) -> None:
        self._folder, self._key = directory / "journal", key
        self.path = self._folder / f"{key}-{rank}.jsonl"
        self._found: dict[Key, dict[str, Any]] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            if _drop_cut_line(self._file) == 0:
                head = {"schema": _SCHEMA, "schema_version": SCHEMA_VERSION, "gradent_version": __version__}
                self._write(head)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror}). Choose another --out.") from error
        self.refresh()

    def refresh(self) -> None:
        """Read what all ranks have written by now.

        Raises:
            DataFileError: a line before the last one is damaged.
        """
        for path in sorted(self._folder.glob(f"{self._key}-*.jsonl")):
            for entry in _read(path):
                self._found[entry["kind"], entry["of"], entry["number"]] = entry["content"]

    def find(self, kind: str, of: str, number: int = 0) -> dict[str, Any] | None:
        """A finding, or None where it has not been made.

        Args:
            kind: of finding.
            of: what it is about.
            number: which.

        Returns:
            What was appended under these three.
        """
        return self._found.get((kind, of, number))

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Every finding of a kind, in the order in which they were read or made.

        Args:
            kind: of finding.

        Returns:
            What was appended.
        """
        return [content for (each, _, _), content in self._found.items() if each == kind]

    def append(self, kind: str, of: str, number: int, content: Mapping[str, Any]) -> None:
        """Write a finding to disk; when this returns, no crash can lose it.

        Args:
            kind: of finding.
            of: what it is about.
            number: which.
            content: JSON, without nan and inf.

        Raises:
            JournalError: the disk is full, or gone.
        """
        entry = {"kind": kind, "of": of, "number": number, "content": dict(content)}
        try:
            self._write(entry)
        except OSError as error:
            raise JournalError(
                f"{self.path}: cannot be written ({error.strerror}). What was measured before is kept: make room and "
                "run the same command again."
            ) from error
        self._found[kind, of, number] = entry["content"]  # type: ignore[assignment]

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, size)  # half a line would spoil the next
            raise


def _drop_cut_line(file: int) -> int:
    """Take off a last line that a crash cut short; returns the bytes that are left."""
    size = os.fstat(file).st_size
    whole = size
    while whole:
        start = max(0, whole - 65536)
        at = os.pread(file, whole - start, start).rfind(b"\n")
        if at >= 0:
            whole = start + at + 1
            break
        whole = start
    if whole < size:
        os.ftruncate(file, whole)
    return whole


def _read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file; its last line may be in the making, or cut short by a crash."""
    lines = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataFileError(
                f"{path}:{number}: this line of the audit's journal is damaged ({error}). Remove the file to measure "
                "its part anew, and run the same command again."
            ) from error
        if number == 1:
            if not isinstance(entry, dict) or entry.get("schema") != _SCHEMA:
                raise DataFileError(f"{path}: not a journal of an audit (its first line does not say so). Remove it.")
            check_version(path, str(entry.get("schema_version", "")))
        elif not isinstance(entry, dict) or entry.keys() != {"kind", "of", "number", "content"}:
            raise DataFileError(f"{path}:{number}: not an entry of an audit's journal. Remove the file to go on.")
        else:
            entries.append(entry)
    return entries
