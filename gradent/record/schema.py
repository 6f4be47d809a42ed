"""The parquet tables that runs leave behind, each with the schema version in its metadata.

`pairs.parquet` has a row a pair and checkpoint, `tokens.parquet` a row a token, `modules.parquet` a row a module and
checkpoint, `sample.parquet` a row a measured pair with its texts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradent.record.parquet import TableKind, read_table, table_schema, write_table

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CASE_NAMES",
    "MODULE_COLUMNS",
    "PAIR_COLUMNS",
    "SAMPLE_COLUMNS",
    "TOKEN_COLUMNS",
    "pair_schema",
    "read_modules",
    "read_pairs",
    "read_sample",
    "read_tokens",
    "token_schema",
    "write_modules",
    "write_pairs",
    "write_sample",
    "write_tokens",
]

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

TOKEN_COLUMNS: dict[str, str] = {
    "checkpoint": "string",
    "step": "int64",
    "pair": "int64",
    "side": "string",
    "position": "int64",
    "token_id": "int64",
    "token": "string",
    "identical": "bool_",
    "sq": "float64",
    "entanglement": "float64",
    "aligned_inner": "float64",
    "facing_inner": "float64",
    "own_inner": "float64",
}
"""Columns of `tokens.parquet` in order, each with its Arrow type: a row a token of a response, prompts left out.

`pair` is the row of the data, as in `pairs.parquet`; `side` is chosen or rejected; `position` counts from 0 at the
response's first token; `token` is its text; `identical` says whether the alignment of the two responses matches it.
`sq` is the squared norm of the token's gradient, `entanglement` its inner product with the gradient of the whole other
response (over a side it sums to the pair's `inner`), `aligned_inner` that with the token it is matched with (null where
differing), `facing_inner` that with the differing token it faces (null where identical, or where it faces none).
`own_inner` is its inner product with the gradient of its own whole response (over a side it sums to the response's
squared norm; null in records of before it was measured).
"""

MODULE_COLUMNS: dict[str, str] = {
    "checkpoint": "string",
    "step": "int64",
    "module": "string",
    "pairs": "int64",
    "cosine_part": "float64",
    "chosen_share": "float64",
    "rejected_share": "float64",
}
"""Columns of `modules.parquet` in order, each with its Arrow type: a row a module and checkpoint.

Means over the `pairs` whose cosine is defined: `cosine_part` is the module's part of the cosine (over all modules they
sum to the mean cosine), `chosen_share` and `rejected_share` its parts of `‖g_w‖²` and `‖g_l‖²` (they sum to 1).
"""

SAMPLE_COLUMNS: dict[str, str] = {
    "pair": "int64",
    "where": "string",
    "prompt": "string",
    "chosen": "string",
    "rejected": "string",
    "prompt_len": "int64",
    "chosen_len": "int64",
    "rejected_len": "int64",
    "shared_prefix": "int64",
    "shared_suffix": "int64",
    "edit_distance": "int64",
    "truncated": "int64",
}
"""Columns of `sample.parquet` in order, each with its Arrow type: a row a pair that an audit measured.

`pair` is the row of the data, as in `pairs.parquet`, and `where` its file and line; `prompt`, `chosen` and `rejected`
are texts. The rest counts tokens: of the prompt and both responses, of the longest beginning and the longest end (not
overlapping that beginning) that the responses share, of insertions, deletions and replacements that make one response
the other; `truncated` is how many of the two responses lost their end.
"""

_PAIR_TABLE = TableKind(name="pairs", columns=PAIR_COLUMNS, nullable=NULLABLE)
_TOKEN_TABLE = TableKind(
    name="tokens", columns=TOKEN_COLUMNS, nullable=frozenset({"aligned_inner", "facing_inner", "own_inner"})
)
_MODULE_TABLE = TableKind(name="modules", columns=MODULE_COLUMNS, nullable=frozenset())
_SAMPLE_TABLE = TableKind(name="sample", columns=SAMPLE_COLUMNS, nullable=frozenset())


def pair_schema() -> pa.Schema:
    """The Arrow schema of `pairs.parquet`, with the schema version in its metadata.

    Returns:
        Columns as in `PAIR_COLUMNS`; only those that may be missing are nullable.
    """
    return table_schema(_PAIR_TABLE)


def write_pairs(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write `pairs.parquet` in one piece: the file appears complete, or the one that was there stays.

    Args:
        path: the file to write; its directory is made where needed.
        columns: one sequence per name of `PAIR_COLUMNS`, all of one length; None where a nullable number is missing.
    """
    write_table(path, _PAIR_TABLE, columns)


def read_pairs(path: str | os.PathLike[str]) -> pa.Table:
    """Read a `pairs.parquet` that gradent wrote.

    Args:
        path: the file.

    Returns:
        The table, with the columns of `PAIR_COLUMNS`.
    """
    return read_table(path, _PAIR_TABLE)


def token_schema() -> pa.Schema:
    """The Arrow schema of `tokens.parquet`, with the schema version in its metadata.

    Returns:
        Columns as in `TOKEN_COLUMNS`; only those that may be missing are nullable.
    """
    return table_schema(_TOKEN_TABLE)


def write_tokens(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write `tokens.parquet` in one piece.

    Args:
        path: the file to write; its directory is made where needed.
        columns: one sequence per name of `TOKEN_COLUMNS`, all of one length; None where a nullable number is missing. A
            lone surrogate in a token's text has no UTF-8 and is written as "?".
    """
    write_table(path, _TOKEN_TABLE, columns)


def read_tokens(path: str | os.PathLike[str]) -> pa.Table:
    """Read a `tokens.parquet` that gradent wrote.

    Args:
        path: the file.

    Returns:
        The table, with the columns of `TOKEN_COLUMNS`.
    """
    return read_table(path, _TOKEN_TABLE)


def write_modules(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write `modules.parquet` in one piece.

    Args:
        path: the file to write; its directory is made where needed.
        columns: one sequence per name of `MODULE_COLUMNS`, all of one length.
    """
    write_table(path, _MODULE_TABLE, columns)


def read_modules(path: str | os.PathLike[str]) -> pa.Table:
    """Read a `modules.parquet` that gradent wrote.

    Args:
        path: the file.

    Returns:
        The table, with the columns of `MODULE_COLUMNS`.
    """
    return read_table(path, _MODULE_TABLE)


def write_sample(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Write `sample.parquet` in one piece.

    Args:
        path: the file to write; its directory is made where needed.
        columns: one sequence per name of `SAMPLE_COLUMNS`, all of one length. A lone surrogate in a text has no UTF-8
            and is written as "?".
    """
    write_table(path, _SAMPLE_TABLE, columns)


def read_sample(path: str | os.PathLike[str]) -> pa.Table:
    """Read a `sample.parquet` that gradent wrote.

    Args:
        path: the file.

    Returns:
        The table, with the columns of `SAMPLE_COLUMNS`.
    """
    return read_table(path, _SAMPLE_TABLE)
