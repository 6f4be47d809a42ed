"""The JSON records that runs leave behind: an audit's summary, a demo's findings, the tokens of a pair or a group.

Each kind has a `write` and a `read` (`DocumentKind`), which are functions as well: `write_summary`, `read_summary` ...
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, cast

from gradent.errors import DataFileError, InputError
from gradent.record.atomic import write_whole
from gradent.record.parquet import SCHEMA_VERSION, check_version, first_line
from gradent.version import __version__

__all__ = [
    "AUDIT_FILES", "DemoRecord", "DocumentKind", "GroupTokenRecord", "Summary", "TokenRecord", "read_demo",
    "read_group_tokens", "read_summary", "read_token_record", "write_demo", "write_group_tokens", "write_summary",
    "write_token_record",
]  # fmt: skip

Document = TypeVar("Document", bound=Mapping[str, Any])

AUDIT_FILES = (
    "summary.json", "pairs.parquet", "sample.parquet", "steps.parquet", "modules.parquet", "tokens.parquet",
    "report.html",
)  # fmt: skip
"""What an audit leaves in its directory, beside `figures/` and its journal; the last four are not always there."""


class Summary(TypedDict):
    """Keys of `summary.json`. Shares are fractions of 1, log-probs nats; a number that does not exist is null.

    An audit measures one checkpoint or many. The keys from `model` to `tokens` speak of the last one measured, by step.
    """

    schema: str
    schema_version: int
    gradent_version: str
    complete: bool
    """False where the audit was stopped before all was measured: the record is then a partial one."""
    doubt: str | None
    """What the trainer's own log says against this audit, with the likely causes; null where it says nothing."""
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
    steps: dict[str, Any] | None
    """What steps do to the responses, to first order; null where it was not measured. `sample`: one step on the whole
    sample, of each checkpoint: means of own, partner and others (nats a unit of learning rate), shares of the cases,
    and of the pairs whose step alone says otherwise. `intervals`: from checkpoint to checkpoint, the realised changes,
    the first-order ones (trapezoid), the share explained by it and by either end alone, and modules `{name: [chosen,
    rejected]}`. `what_if`: whether the products behind the losses' step on the sample are exact, and their error.
    `pushed`: the responses that other pairs move most in that step, and by whom."""
    what_if: list[dict[str, Any]]
    """Other losses and hyperparameters on the same gradients: a row each. `sample` has the cases of one step on the
    whole sample."""
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


class GroupTokenRecord(TypedDict):
    """Keys of `group_tokens.json`: what the tokens of a group's rollouts do to its positive ones."""

    schema: str
    schema_version: int
    gradent_version: str
    model: dict[str, Any]
    """checkpoint, base, adapter, step, trainable_parameters, parameters, dtype and device as they were."""
    data: dict[str, Any]
    """source, split, row (counted from 0), rows, where, truncated (completions that lost their end), weights_from."""
    settings: dict[str, Any]
    """What was asked for: max_length and add_eos (as applied), memory_budget, dtype, device."""
    prompt: dict[str, Any]
    """ids, and text: the tokens as one string."""
    rollouts: list[dict[str, Any]]
    """ids, tokens (their texts) and weight of each completion; a weight above 0 raises it."""
    influence: list[dict[str, Any]]
    """positive and rollout (numbers of completions), values (`weight ⟨g_positive, ∇log π(token)⟩` for each token of the
    rollout) and nthr (as many scores; null unless the rollout's weight is below 0)."""
    correlation: float | None
    """Spearman's ρ of exact pull and NTHR's score over the negatives' tokens; null where there is none."""
    correlations: list[dict[str, Any]]
    """positive, and correlation: the same for it alone."""
    notes: list[str]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DocumentKind(Generic[Document]):
    """A kind of JSON record that gradent writes and reads.

    Attributes:
        schema: its schema's name.
        keys: the type that lists its keys.
        noun: several of them, in messages.
        command: of gradent, that writes it.
        writer: the function that writes it, in messages.
        added: keys that were added later: they may be missing, and are then None.
        indent: of the JSON text; None for one line.
        check: called with the path and the record that was read.
    """

    schema: str
    keys: type[Document]
    noun: str
    command: str
    writer: str
    added: Sequence[str] = ()
    indent: int | None = 2
    check: Callable[[str | os.PathLike[str], Any], None] | None = None

    def write(self, path: str | os.PathLike[str], record: Mapping[str, Any]) -> Document:
        """Write a record in one piece, with the schema's name and version and gradent's version filled in.

        Args:
            path: the file to write; its directory is made where needed.
            record: every key of the record; `schema`, `schema_version` and `gradent_version` may be missing, and this
                gradent's own are written. No nan, no inf.

        Returns:
            The record as written.

        Raises:
            InputError: a key is missing or unknown, or a value is not JSON.
        """
        content = {**record, "schema": self.schema, "schema_version": SCHEMA_VERSION, "gradent_version": __version__}
        names = set(self.keys.__annotations__)
        missing, unknown = sorted(names - set(content)), sorted(set(content) - names)
        if missing or unknown:
            raise InputError(f"{self.writer}: missing keys {missing}, unknown {unknown}.")
        try:
            text = json.dumps(content, indent=self.indent, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.writer}: a value is not JSON: {error}") from error
        # A lone surrogate (JSON admits "\ud800") has no UTF-8: written as "?", since only previews can hold one.
        write_whole(Path(path), lambda handle: handle.write(text.encode("utf-8", errors="replace")))
        return cast(Document, content)

    def read(self, path: str | os.PathLike[str]) -> Document:
        """Read a record that gradent wrote.

        Args:
            path: the file.

        Returns:
            The record.

        Raises:
            DataFileError: the file is missing, not JSON, not of this kind, of a newer schema, lacks a key, or its lists
                do not fit each other.
        """
        try:
            content = json.loads(Path(path).read_bytes())
        except FileNotFoundError as error:
            writer = f"gradent {self.command} ... --out DIR"
            raise DataFileError(f"{path}: there is no such file. `{writer}` writes it.") from error
        except (OSError, ValueError) as error:
            raise DataFileError(f"{path}: not a readable JSON file ({first_line(error)}).") from error
        if not isinstance(content, dict) or content.get("schema") != self.schema:
            problem = f"(its `schema` is not {self.schema!r})"
            raise DataFileError(f"{path}: JSON, but not one of gradent's {self.noun} {problem}.")
        check_version(path, str(content.get("schema_version", "")))
        content = {**dict.fromkeys(self.added), **content}
        missing = sorted(set(self.keys.__annotations__) - set(content))
        if missing:
            raise DataFileError(f"{path}: keys missing: {', '.join(missing)}. Run the {self.command} again.")
        if self.check is not None:
            self.check(path, content)
        return cast(Document, content)


def _check_lengths(path: str | os.PathLike[str], record: TokenRecord) -> None:
    """Refuse a token record whose lists are not one number a token."""
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


def _check_rollouts(path: str | os.PathLike[str], record: GroupTokenRecord) -> None:
    """Refuse a group's record whose lists are not one number a token."""
    rollouts = record["rollouts"]
    for number, rollout in enumerate(rollouts):
        if len(rollout["ids"]) != len(rollout["tokens"]):
            raise DataFileError(f"{path}: rollout {number} does not hold one text a token.")
    for part in record["influence"]:
        numbers = part["positive"], part["rollout"]
        if not all(isinstance(number, int) and 0 <= number < len(rollouts) for number in numbers):
            raise DataFileError(f"{path}: influence of rollout {numbers[1]} on {numbers[0]}, of {len(rollouts)} there.")
        lengths = {name: len(part[name]) for name in ("values", "nthr") if part[name] is not None}
        if set(lengths.values()) != {len(rollouts[numbers[1]]["ids"])}:
            raise DataFileError(
                f"{path}: influence of rollout {numbers[1]} holds {lengths}; there must be one a token."
            )


SUMMARY = DocumentKind(
    schema="gradent.audit_summary", keys=Summary, noun="summaries", command="audit", writer="write_summary",
    added=("steps", "doubt"),
)  # fmt: skip
DEMO = DocumentKind(schema="gradent.demo", keys=DemoRecord, noun="demos", command="demo", writer="write_demo")
TOKEN_PAIR = DocumentKind(
    schema="gradent.token_pair", keys=TokenRecord, noun="token records", command="tokens", writer="write_token_record",
    added=("masks",), indent=None, check=_check_lengths,
)  # fmt: skip
GROUP_TOKENS = DocumentKind(
    schema="gradent.token_group", keys=GroupTokenRecord, noun="records of a group's tokens", command="tokens",
    writer="write_group_tokens", indent=None, check=_check_rollouts,
)  # fmt: skip

write_summary, read_summary = SUMMARY.write, SUMMARY.read
write_demo, read_demo = DEMO.write, DEMO.read
write_token_record, read_token_record = TOKEN_PAIR.write, TOKEN_PAIR.read
write_group_tokens, read_group_tokens = GROUP_TOKENS.write, GROUP_TOKENS.read
