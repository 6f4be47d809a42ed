"""From a scan's journal to its records.

Letters: P pairs of the exact sample, K numbers of a row's vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradent.auditing.analysis.columns import judge
from gradent.auditing.analysis.loss_grid import read_hyperparameters
from gradent.auditing.measuring.batches import ENTRIES, REFERENCES
from gradent.record.scans import SCAN_COLUMNS
from gradent.record.table import Floats, Table
from gradent.scanning.batches import HEAD, SCORES
from gradent.scanning.grading import grade
from gradent.scanning.stages import SAMPLE, Scan

ROUNDING = 1e-5
"""Of a log-prob: a model whose log-probs are all that near to its reference's has not been trained yet, and the
differences are rounding, which would rank pairs by chance."""

__all__ = ["describe_scan", "sample_effects", "scan_table"]

_CHANGES = ("chosen_change", "rejected_change")
_SAMPLE_CHANGES = ("chosen_sample_change", "rejected_sample_change")
_REWARDS = ("chosen_reward", "rejected_reward", "reward_margin")


def scan_table(scan: Scan) -> Table:
    """The rows of `scan.parquet`."""
    text, blocks = scan.material.text, scan.scan_blocks
    names = [*SCORES, *(name for name in REFERENCES if name in blocks[0])]
    names += [f"head_{name}" for name in HEAD if f"head_{name}" in blocks[0]]
    order = np.argsort(np.concatenate([block["positions"] for block in blocks]))
    found = {name: np.concatenate([np.array(block[name]) for block in blocks])[order] for name in names}
    nothing = np.full(text.rows, np.nan)
    head = {f"head_{name}": found.get(f"head_{name}", nothing) for name in HEAD}
    columns = {**text, **dict.fromkeys(REFERENCES, nothing), **found, **head}
    if scan.reference.kind == "self":
        columns |= {name: found[name.removeprefix("ref_")] for name in REFERENCES}
    # The weights hang on log-probs alone; where there is no head's block, any entries will do for them.
    entries = {name: np.nan_to_num(head[f"head_{name}"]) for name in HEAD}
    judged = judge(Table({**columns, **entries}), scan.config.loss)
    columns |= {"d_w": judged.d_w.numpy(), "d_l": judged.d_l.numpy()}
    columns["head_change"] = judged.chosen_change.numpy() + 0 * head["head_inner"]
    columns["head_cosine"] = _cosine(*(head[f"head_{name}"] for name in HEAD))
    columns |= _rewards(Table(columns), scan)
    columns |= _exact_columns(scan, text.rows)
    return Table(columns).pick([*SCAN_COLUMNS])


def sample_effects(scan: Scan) -> tuple[Floats, bool]:
    """What pair j does to responses i in a step on the sample's mean loss, nats, `[2, P, P]`; whether it is exact."""
    # Of a row's own product and its partner's the exact value is known, whatever the vectors are.
    table, (vectors, is_exact) = scan.sample_table(), scan.vectors
    pull = scan.pull(table)
    squares, inner = np.stack([table["chosen_sq"], table["rejected_sq"]]), table["inner"]
    effects = np.zeros((2, table.rows, table.rows))
    for side in (0, 1):
        for other in (0, 1):
            products = vectors[side].astype(np.float64) @ vectors[other].astype(np.float64).T
            np.fill_diagonal(products, squares[side] if side == other else inner)
            effects[side] += products * pull[other]
    return effects, is_exact


def describe_scan(scan: Scan, table: Table, effects: tuple[Floats, bool] | None, notes: list[str]) -> dict[str, Any]:
    """What `scan.json` says, but for `seconds`."""
    config, material = scan.config, scan.material.material
    costs = _costs(scan, table)
    kept = [entry["text"] for entry in scan.journal.all("note")]
    source = scan.reference.passed or (scan.reference.source.name if scan.reference.source is not None else None)
    sample = table.select(table["is_exact"])
    return {
        "model": scan.model_record,
        "data": {
            "source": config.data, "split": config.split, "rows": material.rows, "scanned": table.rows,
            "skipped": [{"row": bad.row, "where": bad.where, "reason": bad.reason} for bad in material.pairs.skipped],
            "truncated_responses": int(table["truncated"].sum()), "digest": scan.material.digest,
        },
        "loss": {"name": config.loss.name, **read_hyperparameters(config.loss)},
        "reference": {"kind": scan.reference.kind, "source": source},
        "settings": {**config.settings, **material.applied},
        "exact": None if effects is None else _describe_exact(sample, *effects),
        "grades": grade(sample, costs, config.seed),
        "costs": costs,
        "notes": notes + [note for note in kept if note not in notes],
    }  # fmt: skip


def _describe_exact(sample: Table, effects: Floats, is_exact: bool) -> dict[str, Any]:
    true = np.stack([sample[name] for name in _SAMPLE_CHANGES])
    size = float(np.square(true).sum())
    error = float(np.sqrt(np.square(effects.sum(2) - true).sum() / size)) if size else 0.0
    return {
        "pairs": sample.rows, "is_exact": is_exact, "error": error,
        **{name.replace("_sample", ""): float(sample[name].mean()) for name in _SAMPLE_CHANGES},
    }  # fmt: skip


def _exact_columns(scan: Scan, rows: int) -> dict[str, Any]:
    """The columns behind `is_exact`, nan where a pair is not in the sample."""
    names = [name for name in ENTRIES if name in {"chosen_sq", "rejected_sq", "inner"}]
    columns = {name: np.full(rows, np.nan) for name in (*names, "cosine", *_CHANGES, *_SAMPLE_CHANGES)}
    is_exact = np.zeros(rows, dtype=bool)
    if scan.sample:
        places, table = np.array(scan.sample), scan.sample_table()
        judged, along = judge(table, scan.config.loss), scan.along
        is_exact[places] = True
        for name in names:
            columns[name][places] = table[name]
        columns["cosine"][places] = judged.gram.cosine.numpy()
        for place, (name, of_sample) in enumerate(zip(_CHANGES, _SAMPLE_CHANGES, strict=True)):
            columns[name][places] = getattr(judged, name).numpy()
            columns[of_sample][places] = -along[place]
    return {"is_exact": is_exact, **columns}


def _rewards(columns: Table, scan: Scan) -> dict[str, Floats]:
    """The implicit rewards; nan where there is no other reference, or no β."""
    beta = getattr(scan.config.loss, "beta", None)
    nothing = np.full(columns.rows, np.nan)
    if beta is None or scan.reference.kind in {"self", "none"}:
        return dict.fromkeys(_REWARDS, nothing)
    ratios = [columns[f"{side}_logp"] - columns[f"ref_{side}_logp"] for side in ("chosen", "rejected")]
    scale = np.stack([np.abs(columns[f"{side}_logp"]) + 1 for side in ("chosen", "rejected")])
    if bool((np.abs(np.stack(ratios)) <= ROUNDING * scale).all()):
        return dict.fromkeys(_REWARDS, nothing)
    chosen, rejected = (beta * ratio for ratio in ratios)
    return dict(zip(_REWARDS, (chosen, rejected, chosen - rejected), strict=True))


def _costs(scan: Scan, table: Table) -> dict[str, float | None]:
    """Seconds a pair of each part, over all ranks."""
    blocks, pairs = scan.scan_blocks, table.rows
    found: dict[str, float | None] = {"text": scan.material.seconds / pairs}
    for part in ("forward", "ches", "head", "reference"):
        taken = [block["seconds"][part] for block in blocks if part in block["seconds"]]
        found[part] = sum(taken) / pairs if taken else None
    exact = len(scan.sample)
    found["exact"] = scan.seconds("exact") / exact if exact else None
    # A step on the sample needs the entries, since the log-probs of the loss come with them.
    found["sample"] = (scan.seconds("exact") + scan.seconds(SAMPLE)) / exact if exact else None
    return found


def _cosine(chosen_sq: Floats, rejected_sq: Floats, inner: Floats) -> Floats:
    scale = np.sqrt(chosen_sq * rejected_sq)
    cosine: Floats = np.divide(inner, scale, out=np.full(len(scale), np.nan), where=scale > 0)
    return cosine
