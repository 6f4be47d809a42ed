"""The rows of a data set that are kept, in their order, as the data had them: lines byte for byte, tables typed.

Another kind of file than the data's is written from the rows' values.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gradent.errors import DataFileError, InputError
from gradent.loading.preference_files import Row
from gradent.record.atomic import write_whole

__all__ = ["check_kind", "kind_of_file", "write_rows"]

KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet")


def kind_of_file(path: Path) -> str | None:
    """The kind of a file by its name; None for another one."""
    name = path.name.lower()
    return next((kind for kind in (".jsonl.gz", ".jsonl", ".json", ".parquet") if name.endswith(kind)), None)


def check_kind(out: Path) -> str:
    """The kind of file to write."""
    kind = kind_of_file(out)
    if kind is None:
        raise InputError(f"{out}: a file of this name is not written. Accepted: {', '.join(KINDS)} (--out).")
    return kind


def write_rows(
    out: Path, rows: Sequence[Row], kept: Sequence[int], source: Path, weights: Mapping[int, float] | None
) -> None:
    """Write the rows with these numbers; with `weights`, each with its own under `weight`."""
    kind, is_same = check_kind(out), source.is_file() and kind_of_file(source) == check_kind(out)
    is_lines = kind in {".jsonl", ".jsonl.gz"}
    if is_same and is_lines and weights is None:
        content = b"".join(_lines(source)[number] + b"\n" for number in kept)
        write_whole(out, _packed(kind, content))
        return
    if is_same and kind == ".parquet":
        _write_table(out, source, kept, weights)
        return
    values = [_values(rows[number], weights) for number in kept]
    if kind == ".parquet":
        import pyarrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415

        try:
            table = pyarrow.Table.from_pylist(values)
        except (pyarrow.ArrowException, TypeError) as error:
            raise InputError(f"{out}: the rows are no table ({error}). Choose a .jsonl file (--out).") from error
        write_whole(out, lambda handle: parquet.write_table(table, handle))
        return
    texts = [json.dumps(value, ensure_ascii=False, default=str) for value in values]
    joined = "".join(text + "\n" for text in texts) if is_lines else "[" + ",\n ".join(texts) + "]\n"
    write_whole(out, _packed(kind, joined.encode("utf-8", errors="surrogatepass")))


def _lines(source: Path) -> list[bytes]:
    """The rows of a file of lines, as they stand."""
    opened = gzip.open if source.suffix.lower() == ".gz" else open
    with opened(source, "rb") as handle:
        content = handle.read().removeprefix(b"\xef\xbb\xbf")
    return [line.rstrip(b"\r\n") for line in content.split(b"\n") if not _is_blank(line)]


def _is_blank(line: bytes) -> bool:
    try:
        return not line.decode("utf-8").strip()
    except UnicodeDecodeError:
        return False


def _packed(kind: str, content: bytes) -> Callable[[BinaryIO], object]:
    if kind != ".jsonl.gz":
        return lambda handle: handle.write(content)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as handle:  # the same bytes at any time
        handle.write(content)
    return lambda handle: handle.write(packed.getvalue())


def _write_table(out: Path, source: Path, kept: Sequence[int], weights: Mapping[int, float] | None) -> None:
    import pyarrow  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    table = parquet.read_table(source, partitioning=None).take(list(kept))
    if weights is not None:
        column = pyarrow.array([weights[number] for number in kept], pyarrow.float64())
        names = [name for name in table.column_names if name != "weight"]
        table = table.select(names).append_column("weight", column)
    write_whole(out, lambda handle: parquet.write_table(table, handle))


def _values(row: Row, weights: Mapping[int, float] | None) -> Any:
    if row.problem is not None or not isinstance(row.values, Mapping):
        raise DataFileError(
            f"{row.where}: {row.problem or 'the row is no object'}; it cannot be written to another kind of file, or "
            "with a weight. Correct or remove it, and scan again."
        )
    return row.values if weights is None else {**row.values, "weight": weights[row.index]}
