"""Records as they come: one JSON line a pair, appended and flushed, readable after a crash at any byte."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gradent.errors import DataFileError, InputError
from gradent.record import PAIR_COLUMNS, SCHEMA_VERSION
from gradent.version import __version__

__all__ = ["PairStream", "read_stream"]

_SCHEMA = "gradent.pair_stream"


class PairStream:
    """Appends rows of `PAIR_COLUMNS` to a `.jsonl` file.

    A file that is there already is continued: a run that resumes writes on, and `read_stream` lets the later of two
    rows of one step and pair stand. A last line that a crash cut short is ended first.

    Args:
        path: the file; its directory is made where needed.

    Raises:
        InputError: the file cannot be written.
        DataFileError: the file is there and is not such a stream, or of a newer schema.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            head = b""
            if self.path.exists():
                with open(self.path, "rb") as there:
                    head = there.readline()
            fresh = _is_start(head)
            if not fresh:
                _check_head(self.path, head)
            self._file: IO[bytes] = open(self.path, "ab+")  # noqa: SIM115  (closed by `close`)
            if fresh:
                self._file.truncate(0)
                self._write([{"schema": _SCHEMA, "schema_version": SCHEMA_VERSION, "gradent_version": __version__}])
            else:
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":
                    self._file.write(b"\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error}). Choose another `out`.") from error

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows and hand them to the operating system.

        Args:
            rows: each with the keys of `PAIR_COLUMNS`; no nan, no inf.

        Raises:
            InputError: a row has other keys, or a value that is not JSON.
        """
        for row in rows:
            if set(row) != set(PAIR_COLUMNS):
                raise InputError(f"PairStream: a row has the keys {sorted(row)}; accepted are record.PAIR_COLUMNS.")
        self._write(rows)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        except (TypeError, ValueError) as error:
            raise InputError(f"PairStream: a value is not JSON: {error}") from error
        self._file.write(lines.encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_stream(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Read what a `PairStream` wrote, also while it is being written, and after a crash.

    Args:
        path: the file.

    Returns:
        The columns of `PAIR_COLUMNS`, rows in order of step and pair; of two rows of one step and pair the later one.

    Raises:
        DataFileError: the file is missing, is no such stream or of a newer schema, or a line before the last is broken.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror or error}).") from error
    lines = content.split(b"\n")
    if not _is_start(content):
        _check_head(path, lines[0])
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if _cut_short(lines, number):
                continue
            raise DataFileError(f"{path}:{number}: not a line of a pair stream ({error}).") from error
        if not isinstance(row, dict) or not row.keys() >= PAIR_COLUMNS.keys():
            raise DataFileError(f"{path}:{number}: not a row of a pair stream; its keys are not record.PAIR_COLUMNS.")
        rows[row["checkpoint"], row["step"], row["pair"]] = row
    ordered = [rows[key] for key in sorted(rows)]
    return {name: [row[name] for row in ordered] for name in PAIR_COLUMNS}


def _cut_short(lines: Sequence[bytes], number: int) -> bool:
    """Whether a broken line is one that a crash cut short: it does not end as a row does."""
    return number == len(lines) or not lines[number - 1].endswith(b"}")


def _is_start(content: bytes) -> bool:
    """Whether a file is empty, or holds no more than a first line that a crash cut short."""
    start = json.dumps({"schema": _SCHEMA}).encode()[:-1]
    return b"\n" not in content and not content.endswith(b"}") and start.startswith(content[: len(start)])


def _check_head(path: str | os.PathLike[str], line: bytes) -> None:
    try:
        head = json.loads(line)
    except ValueError:
        head = None
    if not isinstance(head, dict) or head.get("schema") != _SCHEMA:
        raise DataFileError(f"{path}: not a stream of gradent's records (its first line does not say so).")
    if int(head.get("schema_version", 0)) > SCHEMA_VERSION:
        raise DataFileError(
            f"{path}: written with schema version {head['schema_version']}; this gradent ({__version__}) reads up to "
            f"{SCHEMA_VERSION}. Upgrade gradent."
        )
