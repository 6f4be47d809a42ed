"""Records as they come: one JSON line a pair, appended and flushed, readable after a crash at any byte."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradent.errors import DataFileError, InputError
from gradent.record import MOVED_COLUMNS, PAIR_COLUMNS
from gradent.record.json_lines import JsonLines, LineFormat, read_lines

__all__ = ["PairStream", "read_stream"]

_FORMAT = LineFormat(
    schema="gradent.pair_stream", noun="a stream of gradent's records (PairStream)", keys=frozenset(PAIR_COLUMNS),
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

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._lines = JsonLines(self.path, _FORMAT)
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
            if set(row) - set(MOVED_COLUMNS) != set(PAIR_COLUMNS):
                raise InputError(
                    f"PairStream: a row has the keys {sorted(row)}; accepted are record.PAIR_COLUMNS and, beside them, "
                    "record.MOVED_COLUMNS."
                )
        self._lines.append(rows)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


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
