"""Records as they come: one JSON line a pair or row, appended and flushed, readable after a crash at any byte."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradent.errors import DataFileError, InputError
from gradent.record import MOVED_COLUMNS, PAIR_COLUMNS, ROW_COLUMNS, ROW_MOVED_COLUMNS
from gradent.record.json_lines import JsonLines, LineFormat, read_lines

__all__ = ["PairStream", "RowStream", "read_row_stream", "read_stream"]

_FORMAT = LineFormat(
    schema="gradent.pair_stream", noun="a stream of gradent's records (PairStream)", keys=frozenset(PAIR_COLUMNS),
    has_cut_lines=True,
)  # fmt: skip


_ROW_FORMAT = LineFormat(
    schema="gradent.row_stream", noun="a stream of gradent's row records (RowStream)", keys=frozenset(ROW_COLUMNS),
    has_cut_lines=True,
)  # fmt: skip


class PairStream:
    """Appends rows of `PAIR_COLUMNS`, and of `MOVED_COLUMNS` where a step was accounted for, to a `.jsonl` file.

    A file that is there already is continued: a run that resumes writes on, and `read_stream` lets the later of two
    rows of one step and pair stand. A last line that a crash cut short is taken off first.

    Args:
        path: the file; its directory is made where needed.

    Raises:
        InputError: the file cannot be written.
        DataFileError: the file is there and is not such a stream, or of a newer schema.
    """

    _format, _columns, _further = _FORMAT, PAIR_COLUMNS, MOVED_COLUMNS
    _names = "record.PAIR_COLUMNS and, beside them, record.MOVED_COLUMNS"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._lines = JsonLines(self.path, self._format)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error}). Choose another `out`.") from error

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows and hand them to the operating system.

        Args:
            rows: each with the keys of `PAIR_COLUMNS`, and any of `MOVED_COLUMNS`; no nan, no inf.

        Raises:
            InputError: a row has other keys, or a value that is not JSON.
        """
        for row in rows:
            if set(row) - set(self._further) != set(self._columns):
                raise InputError(
                    f"{type(self).__name__}: a row has the keys {sorted(row)}; accepted are {self._names}."
                )
        self._lines.append(rows)

    def rewind(self) -> None:
        """Take off the rows that were appended since the file was opened."""
        self._lines.rewind()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class RowStream(PairStream):
    """As `PairStream`, rows that are no pairs: with the keys of `ROW_COLUMNS`, and any of `ROW_MOVED_COLUMNS`."""

    _format, _columns, _further = _ROW_FORMAT, ROW_COLUMNS, ROW_MOVED_COLUMNS
    _names = "record.ROW_COLUMNS and, beside them, record.ROW_MOVED_COLUMNS"


def read_row_stream(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Read what a `RowStream` wrote, also while it is being written, and after a crash.

    Args:
        path: the file.

    Returns:
        The columns of `ROW_COLUMNS` and `ROW_MOVED_COLUMNS` (None where they were not measured), in order of step and
        row; of two lines of one step and row the later one.

    Raises:
        DataFileError: the file is missing, is no such stream or of a newer schema, or a line before the last is broken.
    """
    try:
        rows = {(row["step"], row["row"]): row for row in read_lines(Path(path), _ROW_FORMAT)}
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror or error}).") from error
    names = [*ROW_COLUMNS, *ROW_MOVED_COLUMNS]
    return {name: [rows[key].get(name) for key in sorted(rows)] for name in names}


def read_stream(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Read what a `PairStream` wrote, also while it is being written, and after a crash.

    Args:
        path: the file.

    Returns:
        The columns of `PAIR_COLUMNS` and `MOVED_COLUMNS` (None where they were not measured), rows in order of step and
        pair; of two rows of one step and pair the later one.

    Raises:
        DataFileError: the file is missing, is no such stream or of a newer schema, or a line before the last is broken.
    """
    try:
        rows = {(row["checkpoint"], row["step"], row["pair"]): row for row in read_lines(Path(path), _FORMAT)}
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror or error}).") from error
    columns = {name: [rows[key][name] for key in sorted(rows)] for name in PAIR_COLUMNS}
    return columns | {name: [rows[key].get(name) for key in sorted(rows)] for name in MOVED_COLUMNS}
