"""What runs leave behind, versioned: `pairs.parquet` (a row a pair), `tokens.parquet` (a row a token) and JSON records.

This file imports neither torch nor, until a parquet file is touched, pyarrow: a report reads records and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from gradent.errors import DataFileError, InputError
from gradent.files import (
    SCHEMA_VERSION,
    TableKind,
    check_version,
    first_line,
    read_table,
    table_schema,
    write_table,
    write_whole,
)
from gradent.version import __version__

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CASE_NAMES",
    "PAIR_COLUMNS",
    "SCHEMA_VERSION",
    "TOKEN_COLUMNS",
    "DemoRecord",
    "Summary",
    "TokenRecord",
    "pair_schema",
    "read_demo",
    "read_pairs",
    "read_summary",
    "read_token_record",
    "read_tokens",
    "token_schema",
    "write_demo",
    "write_pairs",
    "write_summary",
    "write_token_record",
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
}
"""Columns of `tokens.parquet` in order, each with its Arrow type: a row a token of a response, prompts left out.

`pair` is the row of the data, as in `pairs.parquet`; `side` is chosen or rejected; `position` counts from 0 at the
response's first token; `token` is its text; `identical` says whether the alignment of the two responses matches it.
`sq` is the squared norm of the token's gradient, `entanglement` its inner product with the gradient of the whole other
response (over a side it sums to the pair's `inner`), `aligned_inner` that with the token it is matched with (null where
differing), `facing_inner` that with the differing token it faces (null where identical, or where it faces none).
"""

_PAIR_TABLE = TableKind(name="pairs", columns=PAIR_COLUMNS, nullable=NULLABLE)
_TOKEN_TABLE = TableKind(name="tokens", columns=TOKEN_COLUMNS, nullable=frozenset({"aligned_inner", "facing_inner"}))
_SUMMARY_SCHEMA = "gradent.audit_summary"
_DEMO_SCHEMA = "gradent.demo"
_TOKEN_SCHEMA = "gradent.token_pair"


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
    tokens: dict[str, Any] | None
    """What `gradent.audit.token_summary` says of `tokens.parquet`; null where no tokens were measured."""
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


class TokenRecord(TypedDict):
    """Keys of `tokens.json`: the tokens of one pair. T_w and T_l are the tokens of chosen and rejected."""

    schema: str
    schema_version: int
    gradent_version: str
    model: dict[str, Any]
    """checkpoint, base, adapter, step, trainable_parameters, parameters, dtype and device as they were."""
    data: dict[str, Any]
    """source, split, row (counted from 0), rows, where, truncated (responses that lost their end)."""
    settings: dict[str, Any]
    """What was asked for: max_length and add_eos (as applied), memory_budget, by_module, dtype, device."""
    prompt: dict[str, Any]
    """ids, and text: the tokens as one string."""
    chosen: dict[str, Any]
    """ids, tokens (their texts), squares (`‖∇log π(y_w^a)‖²`), effects (of a margin step), T_w each; logp and sq of the
    response."""
    rejected: dict[str, Any]
    """The same, T_l each."""
    inner: list[list[float]]
    """`⟨∇log π(y_w^a), ∇log π(y_l^b)⟩`, T_w rows of T_l numbers."""
    alignment: list[list[int]]
    """[a, b] of the tokens that both responses share."""
    split: dict[str, Any]
    """both_identical, both_differing, one_of_each, aligned, identical, differing (sums of `inner`), and the counts
    identical_tokens and differing_tokens."""
    modules: dict[str, list[float]] | None
    """Each module's part of the chosen square, the rejected square and the inner product of the pair; null unless asked
    for."""
    notes: list[str]
    seconds: float


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


def write_token_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> TokenRecord:
    """Write `tokens.json` in one piece, with the schema's name and version and gradent's version filled in.

    Args:
        path: the file to write; its directory is made where needed.
        record: every key of `TokenRecord`; `schema`, `schema_version` and `gradent_version` may be missing, and this
            gradent's own are written. No nan, no inf.

    Returns:
        The whole record as written.
    """
    whole = _write_document(path, _TOKEN_SCHEMA, TokenRecord, record, "write_token_record", indent=None)
    return cast(TokenRecord, whole)


def read_token_record(path: str | os.PathLike[str]) -> TokenRecord:
    """Read a `tokens.json` that gradent wrote.

    Args:
        path: the file.

    Returns:
        The record.

    Raises:
        DataFileError: the file is missing, not such a record, of a newer schema, or its lists are not one number a
            token.
    """
    record = cast(TokenRecord, _read_document(path, _TOKEN_SCHEMA, TokenRecord, "token records", "tokens"))
    for side in ("chosen", "rejected"):
        lengths = {name: len(record[side][name]) for name in ("ids", "tokens", "squares", "effects")}
        if len(set(lengths.values())) != 1:
            raise DataFileError(f"{path}: {side} holds {lengths}; there must be one of each a token.")
    shape = len(record["chosen"]["ids"]), len(record["rejected"]["ids"])
    if [len(row) for row in record["inner"]] != [shape[1]] * shape[0]:
        raise DataFileError(f"{path}: inner is not a matrix of {shape[0]} rows of {shape[1]} numbers.")
    return record


def _write_document(
    path: str | os.PathLike[str],
    schema: str,
    kind: type,
    content: Mapping[str, Any],
    writer: str,
    indent: int | None = 2,
) -> dict[str, Any]:
    whole = {**content, "schema": schema, "schema_version": SCHEMA_VERSION, "gradent_version": __version__}
    keys = set(kind.__annotations__)
    if set(whole) != keys:
        raise InputError(f"{writer}: missing keys {sorted(keys - set(whole))}, unknown {sorted(set(whole) - keys)}.")
    try:
        text = json.dumps(whole, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{writer}: a value is not JSON: {error}") from error
    # A lone surrogate (JSON admits "\ud800") has no UTF-8: written as "?", since only previews can hold one.
    write_whole(Path(path), lambda handle: handle.write(text.encode("utf-8", errors="replace")))
    return whole


def _read_document(path: str | os.PathLike[str], schema: str, kind: type, noun: str, command: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise DataFileError(f"{path}: there is no such file. `gradent {command} ... --out DIR` writes it.") from error
    except (OSError, ValueError) as error:
        raise DataFileError(f"{path}: not a readable JSON file ({first_line(error)}).") from error
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise DataFileError(f"{path}: JSON, but not one of gradent's {noun} (its `schema` is not {schema!r}).")
    check_version(path, str(content.get("schema_version", "")))
    missing = sorted(set(kind.__annotations__) - set(content))
    if missing:
        raise DataFileError(f"{path}: keys missing: {', '.join(missing)}. Run the {command} again.")
    return content
