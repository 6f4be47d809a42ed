"""`masks.parquet`: a row a response token, with its score and its mask, as `TokenMaskedDPOTrainer` exports it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradent.record.parquet import TableKind, read_table, table_schema, write_table

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["MASK_COLUMNS", "mask_schema", "read_masks", "write_masks"]

MASK_COLUMNS: dict[str, str] = {
    "pair": "int64",
    "side": "string",
    "position": "int64",
    "token_id": "int64",
    "token": "string",
    "score": "float64",
    "mask": "float64",
    "kept": "bool_",
}
"""Columns of `masks.parquet` in order, each with its Arrow type: a row a token of a response, prompts left out.

`pair` is the row of the data, counted from 0; `side` is chosen or rejected; `position` counts from 0 at the response's
first token; `token` is its text. `score` is `u`, `mask` its soft mask `σ(k(u - r))` at the k of the time of export, and
`kept` says whether `u >= r`. Where masks are frozen, `mask` is 1 and `kept` true whatever the score.
"""

_MASK_TABLE = TableKind(
    name="masks", columns=MASK_COLUMNS, nullable=frozenset(), writer="TokenMaskedDPOTrainer.export_masks"
)


def mask_schema() -> pa.Schema:
    """The Arrow schema of `masks.parquet`, with the schema version in its metadata.

    Returns:
        Columns as in `MASK_COLUMNS`.
    """
    return table_schema(_MASK_TABLE)


def write_masks(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write `masks.parquet` in one piece.

    Args:
        path: the file to write; its directory is made where needed.
        columns: one sequence per name of `MASK_COLUMNS`, all of one length. A lone surrogate in a token's text has no
            UTF-8 and is written as "?".
    """
    write_table(path, _MASK_TABLE, columns)


def read_masks(path: str | os.PathLike[str]) -> pa.Table:
    """Read a `masks.parquet` that gradent wrote.

    Args:
        path: the file.

    Returns:
        The table, with the columns of `MASK_COLUMNS`.
    """
    return read_table(path, _MASK_TABLE)
