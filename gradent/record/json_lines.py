"""Files of JSON lines: appended whole lines at a time, and readable after a crash at any byte.

A last line without its end counts where it is whole; where it is not, a crash cut it short or a process is writing it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradent.errors import DataFileError, InputError
from gradent.record.parquet import SCHEMA_VERSION, check_version
from gradent.version import __version__

__all__ = ["JsonLines", "LineFormat", "digest", "read_lines"]

_MOST_HEAD = 4096  # bytes; a head has about 100
_CHUNK = 65536


@dataclass(frozen=True, kw_only=True)
class LineFormat:
    """What a file of JSON lines holds."""

    schema: str  # what its first line must say
    noun: str  # the file, as messages call it
    keys: frozenset[str]  # of every entry
    remedy: str = ""  # what to do about a damaged file
    has_cut_lines: bool = False  # whether earlier versions wrote on behind a line that a crash had cut short


def digest(content: Any) -> str:
    """16 hexadecimal digits that name a JSON value: the same for the same value, in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class JsonLines:
    """A file of JSON lines, open for appending; a file that is there is checked, mended and continued."""

    def __init__(self, path: Path, kind: LineFormat) -> None:
        self.path, self._kind = path, kind
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._mend()
        except BaseException:
            os.close(self._file)
            raise
        self._start = os.fstat(self._file).st_size

    def append(self, entries: Iterable[Mapping[str, Any]], *, sync: bool = False) -> None:
        """Append all entries or none; with `sync`, no crash of the machine can lose them once this returns."""
        try:
            lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.path}: a value of {self._kind.noun} is not JSON: {error}") from error
        size = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(lines):
                written += os.write(self._file, lines[written:])
            if sync:
                os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, size)  # half a line would spoil the next
            raise

    def rewind(self) -> None:
        """Take off what was appended since the file was opened."""
        os.ftruncate(self._file, self._start)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _mend(self) -> None:
        """Write the head of a new file; end or take off a last line that a crash cut short."""
        head = os.pread(self._file, _MOST_HEAD, 0)
        if _is_unfinished_head(head, self._kind):
            os.ftruncate(self._file, 0)
            version = {"schema_version": SCHEMA_VERSION, "gradent_version": __version__}
            self.append([{"schema": self._kind.schema, **version}])
            return
        _check_head(self.path, head.split(b"\n")[0], self._kind)
        size = start = os.fstat(self._file).st_size
        tail = b""
        while start and b"\n" not in tail:
            start = max(0, start - _CHUNK)
            tail = os.pread(self._file, size - start, start)
        line = tail.rpartition(b"\n")[2]
        if not line:
            return
        try:
            json.loads(line)
            os.write(self._file, b"\n")
        except ValueError:
            os.ftruncate(self._file, size - len(line))


def read_lines(path: Path, kind: LineFormat) -> Iterator[dict[str, Any]]:
    """The entries of a file, also while it is being written; a line that a crash cut short is left out."""
    content = path.read_bytes()
    if _is_unfinished_head(content, kind):
        return
    lines = content.split(b"\n")
    _check_head(path, lines[0], kind)
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines) or (kind.has_cut_lines and not line.endswith(b"}")):
                continue
            problem = f"this line of {kind.noun} is damaged ({error})"
            raise DataFileError(f"{path}:{number}: {problem}. {kind.remedy}".rstrip()) from error
        if not isinstance(entry, dict) or not entry.keys() >= kind.keys:
            wanted = f"its keys are not {', '.join(sorted(kind.keys))}"
            raise DataFileError(f"{path}:{number}: not an entry of {kind.noun}: {wanted}. {kind.remedy}".rstrip())
        yield entry


def _is_unfinished_head(content: bytes, kind: LineFormat) -> bool:
    """Whether a file is empty, or holds no more than a head that a crash cut short."""
    start = json.dumps({"schema": kind.schema}).encode()[:-1]
    return b"\n" not in content and not content.endswith(b"}") and start.startswith(content[: len(start)])


def _check_head(path: Path, line: bytes, kind: LineFormat) -> None:
    head = None
    with suppress(ValueError):
        head = json.loads(line)
    if not isinstance(head, dict) or head.get("schema") != kind.schema:
        raise DataFileError(f"{path}: not {kind.noun} (its first line does not say so). {kind.remedy}".rstrip())
    check_version(path, str(head.get("schema_version", "")))
