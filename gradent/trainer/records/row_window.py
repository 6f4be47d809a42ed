"""From records of steps whose rows are no pairs to the plain window that alerts and panels are made from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from gradent.report.live.group_window import GroupWindow, Rollout
from gradent.trainer.records.pushes import MOST_LETTERS, find_pushes
from gradent.trainer.records.row_step import SIDES, RowStepRecord
from gradent.trainer.records.step import share_explained

__all__ = ["to_group_window"]

_MOST_ROWS = 5


def to_group_window(records: Sequence[RowStepRecord], tokenizer: Any) -> GroupWindow:
    """The window of measured steps, in order; without a tokenizer it shows no texts."""
    counts: dict[str, list[int]] = defaultdict(list)
    moved: dict[str, dict[str, list[float]]] = {}
    lowering: dict[str, float] = defaultdict(float)
    accounted: list[tuple[float, float]] = []
    accounts = [record.attribution for record in records if record.attribution is not None]
    sources = list(dict.fromkeys(source for account in accounts for source in account.moved))
    for record in records:
        account = record.attribution
        for name, sign in SIDES.items():
            side = record.side(sign)
            against = side & (torch.zeros(len(side)) if account is None else account.total * sign < 0).bool()
            counts[name].append(int(side.sum()) if account is not None else 0)
            counts[f"{name} against"].append(int(against.sum()))
            for source in sources:
                has_rows = account is not None and source in account.moved and bool(side.any())
                value = float(account.moved[source][side].mean()) if account and has_rows else float("nan")
                moved.setdefault(name, {}).setdefault(source, []).append(value)
            if account is not None and name == "positive":
                for source, values in account.moved.items():
                    lowering[source] += float(values[against].clamp_max(0).sum())
        if account is not None and account.realised is not None:
            accounted += zip(account.total.tolist(), account.realised.tolist(), strict=True)
    return GroupWindow(
        steps=[record.step for record in records], positives=counts["positive"], lowered=counts["positive against"],
        negatives=counts["negative"], raised=counts["negative against"], lowering=dict(lowering), moved=moved,
        accounted=accounted, is_whole=all(account.is_whole for account in accounts),
        explained=share_explained(accounts),
        rollouts=[] if tokenizer is None else _find_rollouts(records, tokenizer),
        pushes=[]
        if tokenizer is None
        else find_pushes(records, _name, lambda record, row: _texts(record, row, tokenizer)[1]),
    )  # fmt: skip


def _find_rollouts(records: Sequence[RowStepRecord], tokenizer: Any) -> list[Rollout]:
    """The row with the largest share of each step's gradient norm, the largest first."""
    found = []
    for record in records:
        share = record.rows.share
        if share is None or record.batch is None or record.rows.weight is None:
            continue
        row = int(share.argmax())
        prompt, text = _texts(record, row, tokenizer)
        found.append(Rollout(
            step=record.step, share=float(share[row]), weight=float(record.rows.weight[row]), prompt=prompt, text=text,
        ))  # fmt: skip
    return sorted(found, key=lambda rollout: -rollout.share)[:_MOST_ROWS]


def _name(record: RowStepRecord, row: int) -> str:
    assert record.rows.weight is not None
    side = "positive" if record.rows.weight[row] > 0 else "negative"
    return f"{side} row {row} of group {int(record.rows.group[row])}"


def _texts(record: RowStepRecord, row: int, tokenizer: Any) -> tuple[str, str]:
    """Prompt and response of a row."""
    assert record.batch is not None
    decode = getattr(tokenizer, "tokenizer", tokenizer).decode  # a processor holds its tokenizer
    ids, marks = record.batch.row(row)
    start = int(marks.int().argmax())
    prompt, response = (decode(part.tolist(), skip_special_tokens=True) for part in (ids[:start], ids[start:]))
    return prompt[:MOST_LETTERS], response[:MOST_LETTERS]
