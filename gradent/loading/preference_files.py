"""Rows of preference data from a file, a directory or the hub, each with the place it came from.

Nothing is judged here but whether a row can be read at all; `gradent.loading.preferences` checks what it says.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from gradent.errors import DataFileError
from gradent.loading.files import is_hub_id

__all__ = ["Row", "check_exists", "read_rows"]

_SUFFIXES = {".jsonl", ".json", ".parquet", ".gz"}
_HUB_DATA = re.compile(r"(?P<name>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<revision>[^:@]+))?")
"""A data set on the hub, with a configuration and a revision: `owner/name:config@revision`."""

_BLANK = re.compile(r"[ \t\r\n]*")
_JSON_ERRORS = (ValueError, RecursionError)
_DATA_ACCEPTED = (
    "Accepted: a .jsonl, .json or .parquet file, .jsonl.gz and .json.gz too, a directory that datasets.load_dataset "
    "or load_from_disk reads, or a dataset id on the hub (owner/name, owner/name:config, owner/name:config@revision)."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the data, readable or not."""

    index: int  # row of the data, counted from 0 (blank lines of a .jsonl file are not rows)
    where: str  # what an error calls it: `pairs.jsonl:17` for a line (from 1), `pairs.parquet, row 16` otherwise
    values: Any = None  # what the row says; None where it cannot be read
    problem: str | None = None  # why it cannot be read; None where it can


def read_rows(source: str | os.PathLike[str], split: str = "train") -> list[Row]:
    """Every row of `source`."""
    path = Path(source)
    if path.is_file():
        if split != "train":
            raise DataFileError(f"{source}: a file has no splits, but split {split!r} is asked for. Leave --split out.")
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
        suffix = path.suffix.lower()
        if suffix == ".gz":
            suffix = path.with_suffix("").suffix.lower().replace(".parquet", "")
        reader = readers.get(suffix)
        if reader is None:
            raise DataFileError(f"{source}: a file ending in {path.suffix!r} is not read. {_DATA_ACCEPTED}")
        try:
            rows = list(reader(path))
        except (OSError, EOFError, zlib.error) as error:
            raise DataFileError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    else:
        check_exists(source)
        rows = _read_dataset(str(source), split)
    if not rows:
        raise DataFileError(f"{source}: no row in it; at least one pair is needed.")
    return rows


def check_exists(source: str | os.PathLike[str]) -> None:
    """Refuse a name that is neither a file, nor a directory, nor a data set on the hub."""
    if not Path(source).exists() and not _may_be_dataset(str(source)):
        raise DataFileError(f"{source}: there is no such file or directory. {_DATA_ACCEPTED}")


def _may_be_dataset(text: str) -> bool:
    """A hub id that does not look like a file: `pairs.josnl` is a file that is not there."""
    found = _HUB_DATA.fullmatch(text)
    if found is not None and (found["config"] or found["revision"]):
        return is_hub_id(found["name"])
    suffix = Path(text).suffix.lower()
    return is_hub_id(text) and (suffix not in _SUFFIXES if "/" in text else not suffix)


def _read_jsonl(path: Path) -> Iterator[Row]:
    index = 0
    with _open(path) as handle:
        for number, line in enumerate(handle, start=1):
            # Each line is decoded on its own, so that one bad byte costs one row and names its line.
            text, problem = _decode(line, first=number == 1)
            if problem is None and not text.strip():
                continue
            where = f"{path}:{number}"
            if problem is None:
                try:
                    yield Row(index=index, where=where, values=json.loads(text))
                except _JSON_ERRORS as error:
                    problem = f"not valid JSON: {_explain(error)}. One JSON object a line is expected."
            if problem is not None:
                yield Row(index=index, where=where, problem=problem)
            index += 1


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix.lower() == ".gz" else open(path, "rb")


def _read_json(path: Path) -> Iterator[Row]:
    with _open(path) as handle:
        text, problem = _decode(handle.read(), first=True)
    if problem is not None:
        raise DataFileError(f"{path}: {problem}")
    if text.lstrip()[:1] == "{" and not ("\n" in text.strip() and _is_json(text)):
        yield from _read_jsonl(path)  # one object a line under the name .json, which datasets reads as well
    else:
        yield from _read_json_array(path, text)


def _read_json_array(path: Path, text: str) -> Iterator[Row]:
    """Element by element, so that each row knows its line and an error names one."""
    position = _skip_blank(text, 0)
    if text[position : position + 1] != "[":
        raise DataFileError(f"{path}:1: a JSON array of objects is expected ([{{...}}, ...]), or one object a line.")
    position = _skip_blank(text, position + 1)
    decoder, index, line, counted = json.JSONDecoder(), 0, 1, 0
    closing = text[position : position + 1]  # an empty array closes at once
    while closing != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            values, position = decoder.raw_decode(text, position)
        except _JSON_ERRORS as error:
            at = getattr(error, "lineno", line)
            raise DataFileError(f"{path}:{at}: not valid JSON: {_explain(error)}.") from error
        yield Row(index=index, where=f"{path}:{line}", values=values)
        position = _skip_blank(text, position)
        closing = text[position : position + 1]
        if closing not in {",", "]"}:
            at = 1 + text.count("\n", 0, position)
            raise DataFileError(f"{path}:{at}: not valid JSON: ',' or ']' expected after row {index}.")
        position = _skip_blank(text, position + 1)
        index += 1
    if position < len(text) and index:
        at = 1 + text.count("\n", 0, position)
        raise DataFileError(f"{path}:{at}: not valid JSON: something follows the array's closing bracket.")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except _JSON_ERRORS:
        return False
    return True


def _explain(error: Exception) -> str:
    """What is wrong with a piece of JSON: the syntax, a number of thousands of digits, or nesting without end."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error).partition(";")[0]


def _skip_blank(text: str, position: int) -> int:
    return _BLANK.match(text, position).end()  # type: ignore[union-attr]  # an empty match is a match


def _decode(content: bytes, *, first: bool) -> tuple[str, str | None]:
    try:
        return content.decode("utf-8-sig" if first else "utf-8"), None
    except UnicodeDecodeError as error:
        place = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        return "", f"not UTF-8 text ({place}). Save the file as UTF-8."


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise DataFileError(
            f'{path}: reading parquet needs pyarrow, which is not installed: pip install "gradent[audit]".'
        ) from error
    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except pyarrow.ArrowException as error:
        raise DataFileError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}).") from error
    for index, values in enumerate(table.to_pylist()):
        yield Row(index=index, where=f"{path}, row {index}", values=values)


def _read_dataset(source: str, split: str) -> list[Row]:
    try:
        import datasets  # noqa: PLC0415
    except ImportError as error:
        raise DataFileError(
            f'{source}: reading a dataset needs the datasets package: pip install "gradent[audit]".'
        ) from error
    saved = Path(source) / "dataset_dict.json", Path(source) / "state.json"
    try:
        if any(marker.is_file() for marker in saved):
            # Of what `save_to_disk` wrote: one of several splits, or a single one under its own name or the default's.
            data = datasets.load_from_disk(source)
            splits = dict(data) if isinstance(data, dict) else {"train" if split == "train" else str(data.split): data}
            if split not in splits:
                raise DataFileError(f"{source}: has no split {split!r}; it has {sorted(splits)}. Pass --split.")
            data = splits[split]
        else:
            found = None if Path(source).exists() else _HUB_DATA.fullmatch(source)
            name, config, revision = (
                (source, None, None) if found is None else found.group("name", "config", "revision")
            )
            data = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataFileError):
            raise
        is_here = Path(source).is_dir()
        hint = "Check the files, and --split." if is_here else f"There is no such directory here. {_DATA_ACCEPTED}"
        cause = error.__cause__ or error  # "An error occurred while generating the dataset" says nothing
        raise DataFileError(
            f"{source}: datasets cannot read it ({' '.join(str(cause).split())[:300]}). {hint}"
        ) from error
    return [Row(index=index, where=f"{source}[{split}], row {index}", values=row) for index, row in enumerate(data)]
