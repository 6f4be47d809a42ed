"""What runs leave behind, versioned: `pairs.parquet` (one row a pair and checkpoint), `summary.json`, `demo.json`.

This file imports neither torch nor, until a parquet file is touched, pyarrow: a report reads records and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict, cast

from gradent.errors import DataFileError, InputError
from gradent.version import __version__

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CASE_NAMES",
    "PAIR_COLUMNS",
    "SCHEMA_VERSION",
    "DemoRecord",
    "Summary",
    "make_directory",
    "pair_schema",
    "read_demo",
    "read_pairs",
    "read_summary",
    "write_demo",
    "write_pairs",
    "write_summary",
]

SCHEMA_VERSION = 1
"""Version of all three files. It grows when a column or key changes meaning or goes; a reader refuses what is newer."""

PAIR_COLUMNS: dict[str, str] = {
    "checkpoint": "string",
    "step": "int64",
    "pair": "int64",
    "chosen_sq": "float64",
    "rejected_sq": "float64",
    "inner": "float64",
    "cosine": "float64",
    "chosen_logp": "float64",
    "rejected_logp": "float64",
    "ref_chosen_logp": "float64",
    "ref_rejected_logp": "float64",
    "chosen_len": "int64",
    "rejected_len": "int64",
    "d_w": "float64",
    "d_l": "float64",
    "chosen_change": "float64",
    "rejected_change": "float64",
    "case": "int64",
}
"""Columns of `pairs.parquet` in order, each with its Arrow type. `pair` is the row of the data, counted from 0."""

NULLABLE = frozenset({"cosine", "ref_chosen_logp", "ref_rejected_logp"})
"""Columns that may hold null: no cosine where a gradient is zero, no reference where the loss needs none."""

CASE_NAMES: dict[int, str] = {1: "ideal", 2: "both_down", 3: "both_up", 4: "reversed", 0: "inactive"}
"""Meaning of the column `case`: Table 1 of the paper, `reversed` (chosen falls, rejected rises) and no gradient."""

_SCHEMA_KEY = b"gradent.schema"
_VERSION_KEY = b"gradent.schema_version"
_WRITER_KEY = b"gradent.version"
_SUMMARY_SCHEMA = "gradent.audit_summary"
_DEMO_SCHEMA = "gradent.demo"


class Summary(TypedDict):
    """Keys of `summary.json`. Shares are fractions of 1, log-probs nats; a number that does not exist is null."""

    schema: str
    schema_version: int
    gradent_version: str
    model: dict[str, Any]
    """checkpoint, base, adapter, step, trainable_parameters, parameters, coverage, dtype and device as they were."""
    reference: dict[str, Any]
    """kind (none, self, adapter_off or model) and source."""
    loss: dict[str, Any]
    """name and every hyperparameter."""
    data: dict[str, Any]
    """source, rows, measured, skipped (row, where, reason of each), truncated_responses."""
    settings: dict[str, Any]
    """What was asked for: max_length (as applied), max_pairs, seed, split, batch_size, engine, dtype, device, ..."""
    cosine: dict[str, Any]
    """min, p5, p25, p50, p75, p95, max, mean, share_positive, undefined."""
    cases: dict[str, dict[str, Any]]
    """count and share by name of the case."""
    weights: dict[str, Any]
    """Median d_w, d_l and d_w/d_l, and what Condition 2 asks of the ratio."""
    norms: dict[str, Any]
    logps: dict[str, Any]
    most_entangled: list[dict[str, Any]]
    modules: dict[str, dict[str, float]] | None
    notes: list[str]
    seconds: float


class DemoRecord(TypedDict):
    """Keys of `demo.json`, which stands beside the `pairs.parquet` of a demo; its checkpoints are the styles."""

    schema: str
    schema_version: int
    gradent_version: str
    model: dict[str, Any]
    """source (None: built on the spot), architecture, parameters, label_words."""
    settings: dict[str, Any]
    """seed and everything in the demo's settings."""
    styles: list[dict[str, str]]
    """style, and the prompt, chosen and rejected text of one of its pairs."""
    findings: list[dict[str, Any]]
    """claim, rule, appears, and evidence: label, mean, error (one standard error over pairs), wanted sign of each."""
    seconds: float


def make_directory(out: str | os.PathLike[str], files: Sequence[str] = ()) -> Path:
    """The directory that files will go to, made and looked at before any work that would be lost without it.

    Args:
        out: the directory.
        files: names of the files that will be written there.

    Returns:
        Its path.

    Raises:
        InputError: it cannot be made or written to, or a directory stands where a file is to go.
    """
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


def pair_schema() -> pa.Schema:
    """The Arrow schema of `pairs.parquet`, with the schema version in its metadata.

    Returns:
        Columns as in `PAIR_COLUMNS`; only those that may be missing are nullable.
    """
    pyarrow, _ = _import_pyarrow()
    fields = [
        pyarrow.field(name, getattr(pyarrow, kind)(), nullable=name in NULLABLE) for name, kind in PAIR_COLUMNS.items()
    ]
    metadata = {_SCHEMA_KEY: b"pairs", _VERSION_KEY: str(SCHEMA_VERSION).encode(), _WRITER_KEY: __version__.encode()}
    return pyarrow.schema(fields, metadata=metadata)


def write_pairs(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write `pairs.parquet` in one piece: the file appears complete, or the one that was there stays.

    Args:
        path: the file to write; its directory is made where needed.
        columns: one sequence per name of `PAIR_COLUMNS`, all of one length; None where a nullable number is missing.

    Raises:
        InputError: a column is missing, unknown, of another length, or holds what its type cannot.
    """
    pyarrow, parquet = _import_pyarrow()
    if set(columns) != set(PAIR_COLUMNS):
        missing, unknown = sorted(set(PAIR_COLUMNS) - set(columns)), sorted(set(columns) - set(PAIR_COLUMNS))
        raise InputError(f"write_pairs: missing columns {missing}, unknown columns {unknown}; see record.PAIR_COLUMNS.")
    schema = pair_schema()
    try:
        table = pyarrow.table({name: list(columns[name]) for name in PAIR_COLUMNS}, schema=schema)
        table.validate(full=True)
    except (pyarrow.ArrowException, TypeError) as error:
        raise InputError(f"write_pairs: the columns do not fit the schema of pairs.parquet: {error}") from error
    for name in set(PAIR_COLUMNS) - NULLABLE:
        if table[name].null_count:
            raise InputError(f"write_pairs: column {name} holds {table[name].null_count} nulls; it may hold none.")
    _write_whole(Path(path), lambda handle: parquet.write_table(table, handle))


def read_pairs(path: str | os.PathLike[str]) -> pa.Table:
    """Read a `pairs.parquet` that gradent wrote.

    Args:
        path: the file.

    Returns:
        The table, with the columns of `PAIR_COLUMNS`.

    Raises:
        DataFileError: the file is missing, not parquet, not gradent's, of a newer schema, or lacks a column.
    """
    pyarrow, parquet = _import_pyarrow()
    try:
        table = parquet.read_table(path, partitioning=None)
    except FileNotFoundError as error:
        raise DataFileError(f"{path}: there is no such file. `gradent audit ... --out DIR` writes it.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataFileError(f"{path}: not a readable parquet file ({_first_line(error)}).") from error
    metadata = table.schema.metadata or {}
    if metadata.get(_SCHEMA_KEY) != b"pairs":
        raise DataFileError(f"{path}: a parquet file, but not one of gradent's records (no schema version in it).")
    _check_version(path, metadata.get(_VERSION_KEY, b"").decode(errors="replace"))
    wrong = [name for name, kind in PAIR_COLUMNS.items() if not _has_column(table, name, kind)]
    if wrong:
        raise DataFileError(f"{path}: columns missing or of another type: {', '.join(wrong)}. Run the audit again.")
    return table


def write_summary(path: str | os.PathLike[str], summary: Mapping[str, Any]) -> Summary:
    """Write `summary.json` in one piece, with the schema's name and version and gradent's version filled in.

    Args:
        path: the file to write; its directory is made where needed.
        summary: every key of `Summary`; `schema`, `schema_version` and `gradent_version` may be missing, and this
            gradent's own are written. No nan, no inf.

    Returns:
        The whole summary as written.

    Raises:
        InputError: a key is missing or unknown, or a value is not JSON.
    """
    return cast(Summary, _write_document(path, _SUMMARY_SCHEMA, Summary, summary, "write_summary"))


def read_summary(path: str | os.PathLike[str]) -> Summary:
    """Read a `summary.json` that gradent wrote.

    Args:
        path: the file.

    Returns:
        The summary.

    Raises:
        DataFileError: the file is missing, not JSON, not gradent's, of a newer schema, or lacks a key.
    """
    return cast(Summary, _read_document(path, _SUMMARY_SCHEMA, Summary, "summaries", "audit"))


def write_demo(path: str | os.PathLike[str], record: Mapping[str, Any]) -> DemoRecord:
    """Write `demo.json` in one piece, with the schema's name and version and gradent's version filled in.

    Args:
        path: the file to write; its directory is made where needed.
        record: every key of `DemoRecord`; `schema`, `schema_version` and `gradent_version` may be missing, and this
            gradent's own are written. No nan, no inf.

    Returns:
        The whole record as written.
    """
    return cast(DemoRecord, _write_document(path, _DEMO_SCHEMA, DemoRecord, record, "write_demo"))


def read_demo(path: str | os.PathLike[str]) -> DemoRecord:
    """Read a `demo.json` that gradent wrote.

    Args:
        path: the file.

    Returns:
        The record.
    """
    return cast(DemoRecord, _read_document(path, _DEMO_SCHEMA, DemoRecord, "demos", "demo"))


def _write_document(
    path: str | os.PathLike[str], schema: str, kind: type, content: Mapping[str, Any], writer: str
) -> dict[str, Any]:
    whole = {**content, "schema": schema, "schema_version": SCHEMA_VERSION, "gradent_version": __version__}
    keys = set(kind.__annotations__)
    if set(whole) != keys:
        raise InputError(f"{writer}: missing keys {sorted(keys - set(whole))}, unknown {sorted(set(whole) - keys)}.")
    try:
        text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{writer}: a value is not JSON: {error}") from error
    # A lone surrogate (JSON admits "\ud800") has no UTF-8: written as "?", since only previews can hold one.
    _write_whole(Path(path), lambda handle: handle.write(text.encode("utf-8", errors="replace")))
    return whole


def _read_document(path: str | os.PathLike[str], schema: str, kind: type, noun: str, command: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise DataFileError(f"{path}: there is no such file. `gradent {command} ... --out DIR` writes it.") from error
    except (OSError, ValueError) as error:
        raise DataFileError(f"{path}: not a readable JSON file ({_first_line(error)}).") from error
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise DataFileError(f"{path}: JSON, but not one of gradent's {noun} (its `schema` is not {schema!r}).")
    _check_version(path, str(content.get("schema_version", "")))
    missing = sorted(set(kind.__annotations__) - set(content))
    if missing:
        raise DataFileError(f"{path}: keys missing: {', '.join(missing)}. Run the {command} again.")
    return content


def _check_version(path: str | os.PathLike[str], text: str) -> None:
    if not text.isdecimal():
        raise DataFileError(f"{path}: its schema version is {text!r}; a whole number is expected.")
    if int(text) > SCHEMA_VERSION:
        raise DataFileError(
            f"{path}: written with schema version {text}; this gradent ({__version__}) reads up to {SCHEMA_VERSION}. "
            "Upgrade gradent, or run the audit again with this one."
        )


def _has_column(table: pa.Table, name: str, kind: str) -> bool:
    pyarrow, _ = _import_pyarrow()
    return name in table.column_names and bool(table.schema.field(name).type == getattr(pyarrow, kind)())


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
