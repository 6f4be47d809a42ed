"""What `gradent scan` leaves behind: `scan.parquet`, a row a pair of the data, and `scan.json`, how it was made."""

from __future__ import annotations

from typing import Any, TypedDict

from gradent.record.documents import DocumentKind
from gradent.record.parquet import TableKind

__all__ = [
    "SCAN_COLUMNS", "SCAN_FILES", "ScanRecord", "read_scan", "read_scan_record", "write_scan", "write_scan_record",
]  # fmt: skip

SCAN_FILES = ("scan.parquet", "scan.json", "effects.npy", "report.html")
"""What a scan leaves in its directory, beside its journal; `effects.npy` is there where pairs were measured exactly."""

_KNOWN = dict.fromkeys(
    (
        "chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "chosen_reward", "rejected_reward",
        "reward_margin", "d_w", "d_l", "ches", "ches_normalized", "head_chosen_sq", "head_rejected_sq", "head_inner",
        "head_cosine", "head_change",
    ),
    "float64",
)  # fmt: skip
_EXACT = dict.fromkeys(
    (
        "chosen_sq", "rejected_sq", "inner", "cosine", "chosen_change", "rejected_change", "chosen_sample_change",
        "rejected_sample_change",
    ),
    "float64",
)  # fmt: skip

SCAN_COLUMNS: dict[str, str] = {
    "pair": "int64", "where": "string", "prompt_len": "int64", "chosen_len": "int64", "rejected_len": "int64",
    "shared_prefix": "int64", "shared_suffix": "int64", "edit_distance": "int64", "truncated": "int64", **_KNOWN,
    "is_exact": "bool_", **_EXACT,
}  # fmt: skip
"""Columns of `scan.parquet` in order, each with its Arrow type: a row a pair of the data.

`pair` is the row of the data, counted from 0, and `where` its file and line; lengths, shared ends and edit distance
count tokens, as in `sample.parquet`. `chosen_reward` and `rejected_reward` are the implicit rewards `β (log π − log
π_ref)`, `reward_margin` their difference (null where the loss has no β, there is no reference, or the model has not
moved from it yet). `d_w` and `d_l` are the loss's weights. `ches` and `ches_normalized` are the CHES scores, `head_...`
the head's block of the Gram entries and `head_change` the change `d_w ‖g_w‖² − d_l ⟨g_w, g_l⟩` that it alone would make
(null without it). The columns behind `is_exact` are null where that is false: the Gram entries over all trainable
parameters, the changes of both log-probs in a step of plain gradient descent, of unit learning rate, on the pair alone,
and in one on the mean loss of the exactly measured pairs.
"""

SCAN = TableKind(
    name="scan", columns=SCAN_COLUMNS, writer="gradent scan ... --out DIR",
    nullable=frozenset({*_EXACT, *(name for name in _KNOWN if name.startswith(("head_", "ref_")) or "reward" in name)}),
)  # fmt: skip


class ScanRecord(TypedDict):
    """Keys of `scan.json`. Log-probs and changes are nats, costs seconds; a number that does not exist is null."""

    schema: str
    schema_version: int
    gradent_version: str
    model: dict[str, Any]
    """checkpoint, base, adapter, step, trainable_parameters, parameters, dtype and device as they were."""
    data: dict[str, Any]
    """source, split, rows, scanned, skipped (row, where, reason of each), truncated_responses, and digest: a name of
    the contents of all rows."""
    loss: dict[str, Any]
    """name and every hyperparameter."""
    reference: dict[str, Any]
    """kind (none, self, adapter_off or model) and source."""
    settings: dict[str, Any]
    """What was asked for: max_length (as applied), exact, seed, batch_size, dtype, ..."""
    exact: dict[str, Any] | None
    """Of the pairs that were measured exactly: pairs, is_exact (whether `effects.npy` is made of whole gradients),
    error (root mean square difference of its row sums from the exact changes, as a share of theirs), chosen_change and
    rejected_change (means of a step on the sample), coverage. null where none were."""
    grades: list[dict[str, Any]]
    """A row a rung: rung, label, cost (seconds a pair), pairs, and of each target (cosine, pair_change, sample_change)
    spearman, low and high: the rank correlation with what it stands in for, both turned so that more is worse, and its
    95% interval by bootstrap over the pairs."""
    costs: dict[str, float | None]
    """Seconds a pair: text, forward, ches, head (softmax and head's block), reference, exact, sample."""
    notes: list[str]
    seconds: float


SCAN_RECORD = DocumentKind(
    schema="gradent.scan", keys=ScanRecord, noun="scans", command="scan", writer="write_scan_record"
)

write_scan, read_scan = SCAN.write, SCAN.read
write_scan_record, read_scan_record = SCAN_RECORD.write, SCAN_RECORD.read
