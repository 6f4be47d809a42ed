"""Files of records: each appears whole or not at all, and its schema version is checked when it is read.

This file imports neither torch nor, until a parquet file is touched, pyarrow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gradent.errors import DataFileError, InputError
from gradent.version import __version__

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "SCHEMA_VERSION",
    "TableKind",
    "check_version",
    "first_line",
    "make_directory",
    "read_table",
    "table_schema",
    "write_table",
    "write_whole",
]

SCHEMA_VERSION = 1
"""Version of all records. It grows when a column or key changes meaning or goes; a reader refuses what is newer."""

_SCHEMA_KEY = b"gradent.schema"
_VERSION_KEY = b"gradent.schema_version"
_WRITER_KEY = b"gradent.version"


@dataclass(frozen=True, kw_only=True)
class TableKind:
    """A kind of parquet file that gradent writes."""

    name: str  # its schema's name; the file is usually `{name}.parquet`
    columns: Mapping[str, str]  # columns in order, each with its Arrow type as pyarrow names it
    nullable: frozenset[str]  # columns that may hold null
    writer: str = "gradent audit ... --out DIR"  # what writes the file, as a user calls it


def make_directory(out: str | os.PathLike[str], files: Sequence[str] = ()) -> Path:
    """The directory that files will go to, made and looked at before any work that would be lost without it."""
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


def table_schema(kind: TableKind) -> pa.Schema:
    """The Arrow schema of a kind of table, with the schema version in its metadata."""
    pyarrow, _ = _import_pyarrow()
    fields = [
        pyarrow.field(name, getattr(pyarrow, arrow)(), nullable=name in kind.nullable)
        for name, arrow in kind.columns.items()
    ]
    version = {_VERSION_KEY: str(SCHEMA_VERSION).encode(), _WRITER_KEY: __version__.encode()}
    return pyarrow.schema(fields, metadata={_SCHEMA_KEY: kind.name.encode(), **version})


def write_table(path: str | os.PathLike[str], kind: TableKind, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a table in one piece: the file appears complete, or the one that was there stays."""
    pyarrow, parquet = _import_pyarrow()
    writer = f"write_{kind.name}"
    if set(columns) != set(kind.columns):
        missing, unknown = sorted(set(kind.columns) - set(columns)), sorted(set(columns) - set(kind.columns))
        raise InputError(f"{writer}: missing columns {missing}, unknown columns {unknown}; it takes {[*kind.columns]}.")
    try:
        values = {name: [_encodable(value) for value in columns[name]] for name in kind.columns}
        table = pyarrow.table(values, schema=table_schema(kind))
        table.validate(full=True)
    except (pyarrow.ArrowException, TypeError) as error:
        raise InputError(f"{writer}: the columns do not fit the schema of {kind.name}.parquet: {error}") from error
    for name in set(kind.columns) - kind.nullable:
        if table[name].null_count:
            raise InputError(f"{writer}: column {name} holds {table[name].null_count} nulls; it may hold none.")
    write_whole(Path(path), lambda handle: parquet.write_table(table, handle))


def read_table(path: str | os.PathLike[str], kind: TableKind) -> pa.Table:
    """Read a table that gradent wrote."""
    pyarrow, parquet = _import_pyarrow()
    try:
        table = parquet.read_table(path, partitioning=None)
    except FileNotFoundError as error:
        raise DataFileError(f"{path}: there is no such file. `{kind.writer}` writes it.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataFileError(f"{path}: not a readable parquet file ({first_line(error)}).") from error
    metadata = table.schema.metadata or {}
    found = metadata.get(_SCHEMA_KEY, b"").decode(errors="replace")
    if found != kind.name:
        raise DataFileError(
            f"{path}: a parquet file, but not one of gradent's records of {kind.name} (its schema is {found!r})."
        )
    check_version(path, metadata.get(_VERSION_KEY, b"").decode(errors="replace"))
    for name in sorted(kind.nullable - set(table.column_names)):  # of before there was such a column
        table = table.append_column(name, pyarrow.nulls(len(table), getattr(pyarrow, kind.columns[name])()))
    wrong = [name for name, arrow in kind.columns.items() if not _has_column(table, name, arrow)]
    if wrong:
        raise DataFileError(f"{path}: columns missing or of another type: {', '.join(wrong)}. Run the audit again.")
    return table


def check_version(path: str | os.PathLike[str], text: str) -> None:
    """Refuse a record whose schema this gradent does not know."""
    if not text.isdecimal():
        raise DataFileError(f"{path}: its schema version is {text!r}; a whole number is expected.")
    if int(text) > SCHEMA_VERSION:
        raise DataFileError(
            f"{path}: written with schema version {text}; this gradent ({__version__}) reads up to {SCHEMA_VERSION}. "
            "Upgrade gradent, or run the audit again with this one."
        )


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


def first_line(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) else value


def _has_column(table: pa.Table, name: str, kind: str) -> bool:
    pyarrow, _ = _import_pyarrow()
    return name in table.column_names and bool(table.schema.field(name).type == getattr(pyarrow, kind)())


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
