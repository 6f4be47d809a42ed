"""Parquet tables with a schema and its version in their metadata. pyarrow is imported when a table is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradent.errors import DataFileError, InputError
from gradent.record.atomic import write_whole
from gradent.version import __version__

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SCHEMA_VERSION", "TableKind", "check_version", "first_line"]

SCHEMA_VERSION = 1
"""Version of all records. It grows when a column or key changes meaning or goes; a reader refuses what is newer."""

_SCHEMA_KEY = b"gradent.schema"
_VERSION_KEY = b"gradent.schema_version"
_WRITER_KEY = b"gradent.version"


@dataclass(frozen=True, kw_only=True)
class TableKind:
    """A kind of parquet file that gradent writes and reads.

    Attributes:
        name: its schema's name; the file is usually `{name}.parquet`.
        columns: columns in order, each with its Arrow type as pyarrow names it.
        nullable: columns that may hold null.
        writer: what writes the file, as a user calls it.
    """

    name: str
    columns: Mapping[str, str]
    nullable: frozenset[str] = frozenset()
    writer: str = "gradent audit ... --out DIR"

    def schema(self) -> pa.Schema:
        """The Arrow schema, with the schema version in its metadata.

        Returns:
            The columns in order; only those that may be missing are nullable.
        """
        pyarrow, _ = _import_pyarrow()
        types = {name: getattr(pyarrow, arrow)() for name, arrow in self.columns.items()}
        fields = [pyarrow.field(name, kind, nullable=name in self.nullable) for name, kind in types.items()]
        version = {_VERSION_KEY: str(SCHEMA_VERSION).encode(), _WRITER_KEY: __version__.encode()}
        return pyarrow.schema(fields, metadata={_SCHEMA_KEY: self.name.encode(), **version})

    def write(self, path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Write a table in one piece: the file appears complete, or the one that was there stays.

        Args:
            path: the file to write; its directory is made where needed.
            columns: one sequence per column, all of one length; None or nan where a nullable value is missing. A lone
                surrogate in a text has no UTF-8 and is written as "?".

        Raises:
            InputError: a column is missing, unknown, of another length, or holds what its type cannot.
        """
        pyarrow, parquet = _import_pyarrow()
        writer = f"write_{self.name}"
        if set(columns) != set(self.columns):
            missing, unknown = sorted(set(self.columns) - set(columns)), sorted(set(columns) - set(self.columns))
            accepted = [*self.columns]
            raise InputError(f"{writer}: missing columns {missing}, unknown columns {unknown}; it takes {accepted}.")
        try:
            arrays = [
                # from_pandas: nan is null.
                pyarrow.array([*map(_encodable, columns[field.name])], field.type, from_pandas=field.nullable)
                for field in self.schema()
            ]
            table = pyarrow.table(arrays, schema=self.schema())
            table.validate(full=True)
        except (pyarrow.ArrowException, TypeError) as error:
            raise InputError(f"{writer}: the columns do not fit the schema of {self.name}.parquet: {error}") from error
        for name in set(self.columns) - self.nullable:
            if table[name].null_count:
                raise InputError(f"{writer}: column {name} holds {table[name].null_count} nulls; it may hold none.")
        write_whole(Path(path), lambda handle: parquet.write_table(table, handle))

    def read(self, path: str | os.PathLike[str]) -> pa.Table:
        """Read a table that gradent wrote.

        Args:
            path: the file.

        Returns:
            The table. A nullable column that is not there, in a record of before it was added, holds only nulls.

        Raises:
            DataFileError: the file is missing, not parquet, not of this kind, of a newer schema, or lacks a column.
        """
        pyarrow, parquet = _import_pyarrow()
        try:
            table = parquet.read_table(path, partitioning=None)
        except FileNotFoundError as error:
            raise DataFileError(f"{path}: there is no such file. `{self.writer}` writes it.") from error
        except (pyarrow.ArrowException, OSError) as error:
            raise DataFileError(f"{path}: not a readable parquet file ({first_line(error)}).") from error
        metadata = table.schema.metadata or {}
        name = metadata.get(_SCHEMA_KEY, b"").decode(errors="replace")
        if name != self.name:
            raise DataFileError(
                f"{path}: a parquet file, but not one of gradent's records of {self.name} (its schema is {name!r})."
            )
        check_version(path, metadata.get(_VERSION_KEY, b"").decode(errors="replace"))
        types = {name: getattr(pyarrow, arrow)() for name, arrow in self.columns.items()}
        for name in sorted(self.nullable - set(table.column_names)):
            table = table.append_column(name, pyarrow.nulls(len(table), types[name]))
        wrong = [
            name for name, kind in types.items()
            if name not in table.column_names or table.schema.field(name).type != kind
        ]  # fmt: skip
        if wrong:
            raise DataFileError(f"{path}: columns missing or of another type: {', '.join(wrong)}. Run the audit again.")
        return table


def check_version(path: str | os.PathLike[str], text: str) -> None:
    """Refuse a record whose schema version, as it states it in `text`, is not known to this gradent."""
    if not text.isdecimal():
        raise DataFileError(f"{path}: its schema version is {text!r}; a whole number is expected.")
    if int(text) > SCHEMA_VERSION:
        raise DataFileError(
            f"{path}: written with schema version {text}; this gradent ({__version__}) reads up to {SCHEMA_VERSION}. "
            "Upgrade gradent, or run the audit again with this one."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) else value


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            "Records are parquet files, which pyarrow reads and writes, and it is not installed. Install the extra: "
            'pip install "gradent[audit]".'
        ) from error
    return pyarrow, pyarrow.parquet
