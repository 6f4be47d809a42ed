"""What an audit's `summary.json` says, and the tables beside it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from gradent.auditing.analysis.columns import (
    TargetRecord,
    module_table,
    sample_table,
    token_table,
    without_references,
)
from gradent.auditing.analysis.distributions import most_entangled, summarize_columns
from gradent.auditing.analysis.dynamics import dynamics
from gradent.auditing.analysis.loss_grid import read_hyperparameters
from gradent.auditing.analysis.properties import summarize_properties
from gradent.auditing.analysis.recommendation import find_foretold, recommend
from gradent.auditing.analysis.steps import (
    StepRecord,
    collect_steps,
    describe_steps,
    plan_steps,
    read_sample_step,
    step_table,
)
from gradent.auditing.analysis.tokens import summarize_tokens
from gradent.auditing.analysis.what_if import what_if
from gradent.auditing.measuring.sweep import Sweep
from gradent.auditing.state.config import AuditConfig
from gradent.auditing.state.targets import AuditPlan
from gradent.errors import GradentError, ModelError
from gradent.loading.runs.discover import Run
from gradent.loading.runs.trainer_log import read_history
from gradent.record import CASE_NAMES
from gradent.record.table import Table, stack

__all__ = ["Outcome", "preview", "summarize"]

_SHOWN = 5  # most entangled pairs
_CONTEXT = 12  # characters that two responses share and that a preview shows before they part


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an audit writes."""

    pairs: Table
    sample: Table
    steps: Table | None
    modules: Table | None
    tokens: Table | None
    summary: dict[str, Any]


def summarize(
    config: AuditConfig, plan: AuditPlan, records: list[TargetRecord], sweep: Sweep, notes: list[str], *,
    doubt: str | None, complete: bool,
) -> Outcome:  # fmt: skip
    """The tables and the summary of what was measured; `doubt` is what the trainer's log says against it."""
    failures, journal, loss = sweep.failures, sweep.journal, config.loss
    if not records:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in failures.items())
        raise ModelError(f"{config.model}: no checkpoint could be measured.{reasons}")
    # Batches hold the longest pairs first, so that what is half measured does not stand for the data.
    judged = [record for record in records if record.is_whole] or records
    last, table, sample = judged[-1], stack([record.table for record in judged]), sample_table(plan.pairs)
    tokens = None
    if config.token_pairs is not None:  # the journal may hold those of other calls
        tokens = token_table(last.target, last.spread(plan.pairs, config.token_pairs), journal)
    steps, sample_step = list[StepRecord](), None
    if config.attribution:
        steps = collect_steps(records, plan_steps(records), journal, len(plan.batches))
        if last.is_whole:
            sample_step = read_sample_step(last.target, last.table, journal, len(plan.batches))
    rows = what_if(table, loss, tokens, sample_step)
    described = describe_steps(steps, sample_step, last, loss)
    history = _read_history(plan.run, notes)
    moved = dynamics(_with_start(table, plan), {} if history is None else history["curves"])
    foretold = find_foretold(described, moved, is_sample=bool(rows) and rows[0].get("sample") is not None)
    kept_notes = [entry["text"] for entry in journal.all("note")]
    reference = plan.reference.passed or (plan.reference.source.name if plan.reference.source is not None else None)
    left_out = [(target, failures[target.name]) for target in plan.targets if target.name in failures]
    left_out += [(last.target, f"Its tokens alone: {reason}") for reason in sweep.token_failures]
    left_out += [
        (target, f"Its steps alone: {sweep.step_failures[target.name]}")
        for target in plan.targets if target.name in sweep.step_failures
    ]  # fmt: skip
    summary = {
        "complete": complete, "doubt": doubt, "run": _describe_run(plan),
        "left_out": [
            {"checkpoint": target.name, "step": target.step, "reason": reason} for target, reason in left_out
        ],
        "checkpoints": [
            {
                "name": record.target.name, "step": record.target.step, "pairs": record.table.rows,
                **summarize_columns(record.table),
            }
            for record in records
        ],
        "history": history,
        "dynamics": moved, "steps": described, "what_if": rows,
        "recommendation": recommend(rows, foretold, (plan.material.repeated, len(plan.pairs))),
        "properties": summarize_properties(last.table, sample), "model": last.model,
        **summarize_columns(last.table), "most_entangled": _describe_most_entangled(last, plan),
        "modules": last.modules, "reference": {"kind": plan.reference.kind, "source": reference},
        "data": {
            "source": config.data, "rows": plan.material.rows, "measured": len(plan.pairs),
            "skipped": [
                {"row": bad.row, "where": bad.where, "reason": bad.reason} for bad in plan.material.pairs.skipped
            ],
            "truncated_responses": sum(pair.truncated for pair in plan.pairs),
        },
        "tokens": summarize_tokens(tokens, last.table) if tokens is not None else None,
        "loss": {"name": loss.name, **read_hyperparameters(loss)},
        "settings": {**config.settings, **plan.material.applied},
        "notes": ([] if doubt is None else [doubt]) + notes + [note for note in kept_notes if note not in notes],
    }  # fmt: skip
    return Outcome(
        pairs=stack([record.table for record in records]), sample=sample, steps=step_table(steps),
        modules=module_table(records), tokens=tokens, summary=summary,
    )  # fmt: skip


def preview(text: str, other: str, width: int = 160) -> str:
    """A line of one response from just before the point where it leaves the other, in printable characters."""
    common = sum(1 for _ in takewhile(lambda letters: letters[0] == letters[1], zip(text, other, strict=False)))
    start = common - _CONTEXT if common > 2 * _CONTEXT else 0
    line = ("…" if start else "") + text[start : start + 4 * width]
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in line).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _with_start(table: Table, plan: AuditPlan) -> Table:
    """The table, with the reference's log-probs only where it is the model that the run started from."""
    if plan.run is not None and plan.reference.passed is None:
        return table
    return without_references(table)


def _describe_run(plan: AuditPlan) -> dict[str, Any] | None:
    if plan.run is None:
        return None
    return {
        "directory": str(plan.run.directory), "kind": plan.run.kind, "base": plan.run.base,
        "found": [checkpoint.step for checkpoint in plan.run.checkpoints],
        "asked": [target.step for target in plan.targets],
    }  # fmt: skip


def _describe_most_entangled(last: TargetRecord, plan: AuditPlan) -> list[dict[str, Any]]:
    by_row = {pair.row: pair for pair in plan.pairs}
    rows = last.table.select(np.array(most_entangled(last.table["cosine"], _SHOWN), dtype=np.int64)).to_lists()
    described = []
    for row, cosine, case in zip(rows["pair"], rows["cosine"], rows["case"], strict=True):
        pair = by_row[row]
        described.append({
            "pair": row, "where": pair.where, "cosine": cosine, "case": CASE_NAMES[case],
            "chosen": preview(pair.chosen_text, pair.rejected_text),
            "rejected": preview(pair.rejected_text, pair.chosen_text),
        })  # fmt: skip
    return described


def _read_history(run: Run | None, notes: list[str]) -> dict[str, Any] | None:
    if run is None or run.history is None:
        return None
    try:
        history = read_history(run.history)
    except GradentError as error:  # it was whole when the run was looked at
        notes.append(f"What the trainer logged is left out. {error}")
        return None
    notes.extend(history.problems)
    curves = {key: [list(point) for point in points] for key, points in history.curves.items()}
    return {"source": history.source, "curves": curves}
