"""The JSON records that runs leave behind: an audit's summary, a demo's findings, the tokens of one pair."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from gradent.errors import DataFileError, InputError
from gradent.record.parquet import SCHEMA_VERSION, check_version, first_line, write_whole
from gradent.version import __version__

__all__ = [
    "AUDIT_FILES",
    "DemoRecord",
    "Summary",
    "TokenRecord",
    "read_demo",
    "read_summary",
    "read_token_record",
    "write_demo",
    "write_summary",
    "write_token_record",
]

_SUMMARY_SCHEMA = "gradent.audit_summary"
_DEMO_SCHEMA = "gradent.demo"
_TOKEN_SCHEMA = "gradent.token_pair"


AUDIT_FILES = (
    "summary.json",
    "pairs.parquet",
    "sample.parquet",
    "modules.parquet",
    "tokens.parquet",
    "report.html",
)
"""What an audit leaves in its directory, beside `figures/` and its journal; the last three are not always there."""


class Summary(TypedDict):
    """Keys of `summary.json`. Shares are fractions of 1, log-probs nats; a number that does not exist is null.

    An audit measures one checkpoint or many. The keys from `model` to `tokens` speak of the last one measured, by step.
    """

    schema: str
    schema_version: int
    gradent_version: str
    complete: bool
    """False where the audit was stopped before all was measured: the record is then a partial one."""
    run: dict[str, Any] | None
    """directory, kind (full or adapter), base, found (steps of all checkpoints there) and asked (steps of those to
    measure); null for a single model that is no run."""
    left_out: list[dict[str, Any]]
    """checkpoint, step and reason of each checkpoint that could not be measured."""
    checkpoints: list[dict[str, Any]]
    """Of each measured checkpoint, by step: name, step, pairs, and cosine, cases, weights, norms and logps as below."""
    history: dict[str, Any] | None
    """What the trainer logged: source (the file's name) and curves, `{key: [[step, value], ...]}`; null without it."""
    dynamics: dict[str, Any] | None
    """When both log-probs began to fall, and what the first-order theory explains; null for a single checkpoint whose
    trainer logged no curve of log-probs that is long enough."""
    what_if: list[dict[str, Any]]
    """Other losses and hyperparameters on the same gradients: a row each."""
    recommendation: dict[str, Any] | None
    """text, and the numbers that it rests on; null where nothing was measured."""
    properties: list[dict[str, Any]]
    """What goes with entanglement: a row a property of pairs."""
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
    """What `gradent.auditing.analysis.tokens` says of `tokens.parquet`; null where no tokens were measured."""
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
    masks: dict[str, Any] | None
    """Of a token-masked loss: source (the file's name), and of chosen and rejected each token's mask and whether it is
    kept; null unless asked for."""
    notes: list[str]
    seconds: float


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
    whole = _read_document(path, _TOKEN_SCHEMA, TokenRecord, "token records", "tokens", added=("masks",))
    record = cast(TokenRecord, whole)
    for side in ("chosen", "rejected"):
        masks = (record["masks"] or {}).get(side, {})
        wrong = {name: len(values) for name, values in masks.items() if len(values) != len(record[side]["ids"])}
        if wrong:
            raise DataFileError(f"{path}: masks of {side} hold {wrong}; there must be one of each a token.")
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


def _read_document(
    path: str | os.PathLike[str], schema: str, kind: type, noun: str, command: str, added: Sequence[str] = ()
) -> dict[str, Any]:
    """The document. Keys that were `added` to its kind later may be missing, and are then None."""
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise DataFileError(f"{path}: there is no such file. `gradent {command} ... --out DIR` writes it.") from error
    except (OSError, ValueError) as error:
        raise DataFileError(f"{path}: not a readable JSON file ({first_line(error)}).") from error
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise DataFileError(f"{path}: JSON, but not one of gradent's {noun} (its `schema` is not {schema!r}).")
    check_version(path, str(content.get("schema_version", "")))
    content = {**dict.fromkeys(added), **content}
    missing = sorted(set(kind.__annotations__) - set(content))
    if missing:
        raise DataFileError(f"{path}: keys missing: {', '.join(missing)}. Run the {command} again.")
    return content
