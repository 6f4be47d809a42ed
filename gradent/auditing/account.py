"""What is to be said of an audit: its settings and its plan in, its tables, its summary and its page out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradent.auditing.analysis.columns import (
    Measured,
    collect,
    describe_checkpoints,
    describe_last,
    describe_loss,
    module_columns,
    pair_columns,
    sample_columns,
    token_columns,
)
from gradent.auditing.analysis.dynamics import dynamics
from gradent.auditing.analysis.properties import summarize_properties
from gradent.auditing.analysis.tokens import summarize_tokens
from gradent.auditing.analysis.what_if import recommend, what_if
from gradent.auditing.measuring.sweep import Sweep
from gradent.auditing.state.targets import ReferenceChoice, Target
from gradent.errors import GradentError, ModelError
from gradent.loading.prepare import Material
from gradent.loading.runs.discover import Run
from gradent.loading.runs.trainer_log import read_history
from gradent.losses import Loss
from gradent.record import AUDIT_FILES, write_modules, write_pairs, write_sample, write_summary, write_tokens
from gradent.report.rebuild import write_audit

__all__ = ["Plan", "Records", "Setting", "summarize", "write_records"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What `audit` was asked for; see there."""

    model: str
    data: str
    checkpoints: str | Sequence[int]
    base: str | None
    adapter: str | None
    reference: str | None
    split: str
    max_length: int | None
    max_pairs: int | None
    token_pairs: int | None
    batch_size: int
    memory_budget: int | str | None
    engine: str
    by_module: bool
    dtype: str
    device: str | None
    skip_bad_rows: bool
    add_eos: bool
    trust_remote_code: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What there is to measure, and what is known of it."""

    targets: list[Target]
    run: Run | None
    reference: ReferenceChoice
    material: Material
    batches: list[list[int]]

    def collect(self, loss: Loss, sweep: Sweep) -> list[Measured]:
        """What the journal holds of each target that did not fail.

        Args:
            loss: judges the pairs.
            sweep: whose journal it is, and which knows what failed.

        Returns:
            One each for those of which something was measured.
        """
        targets = [target for target in self.targets if target.name not in sweep.failures]
        return collect(targets, self.reference, self.batches, self.material.pairs.pairs, sweep.journal, loss)


@dataclass(frozen=True, kw_only=True)
class Records:
    """What is about to be written."""

    pairs: dict[str, list[Any]]
    sample: dict[str, list[Any]]
    modules: dict[str, list[Any]] | None
    tokens: dict[str, list[Any]] | None
    summary: dict[str, Any]


def summarize(
    setting: Setting,
    loss: Loss,
    plan: Plan,
    sweep: Sweep,
    notes: list[str],
    *,
    complete: bool,
) -> Records:
    """The tables and the summary of what was measured.

    Args:
        setting: what was asked for.
        loss: judges the pairs.
        plan: what there was to measure.
        sweep: what measured it.
        notes: what the user was told before.
        complete: whether it came to its end.

    Returns:
        The tables and the summary.

    Raises:
        ModelError: nothing was measured.
    """
    measured = plan.collect(loss, sweep)
    if not measured:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in sweep.failures.items())
        raise ModelError(f"{setting.model}: no checkpoint could be measured.{listed}")
    # Batches hold the longest pairs first, so that what is half measured does not stand for the data.
    judged = [each for each in measured if each.whole] or measured
    pairs, last = plan.material.pairs.pairs, judged[-1]
    whole, sample = pair_columns(judged), sample_columns(pairs)
    tokens = None
    if setting.token_pairs is not None:  # the journal may hold those of other calls
        tokens = token_columns(last.target, last.spread(pairs, setting.token_pairs), sweep.journal)
    rows = what_if(whole, loss, tokens)
    history = _read_history(plan.run, notes)
    kept = [each["text"] for each in sweep.journal.all("note")]
    summary = {
        "complete": complete,
        "run": _describe_run(plan),
        "left_out": [
            {"checkpoint": target.name, "step": target.step, "reason": sweep.failures[target.name]}
            for target in plan.targets
            if target.name in sweep.failures
        ]
        + [
            {"checkpoint": last.target.name, "step": last.target.step, "reason": f"Its tokens alone: {reason}"}
            for reason in sweep.token_failures
        ],
        "checkpoints": describe_checkpoints(measured),
        "history": history,
        "dynamics": dynamics(_with_start(whole, plan), {} if history is None else history["curves"]),
        "what_if": rows,
        "recommendation": recommend(rows),
        "properties": summarize_properties(last.columns, sample),
        **describe_last(last, pairs),
        "reference": {"kind": plan.reference.kind, "source": plan.reference.given or _base(plan.reference)},
        "data": _describe_data(setting, plan.material),
        "tokens": summarize_tokens(tokens, last.columns) if tokens is not None and tokens["pair"] else None,
        "loss": describe_loss(loss),
        "settings": _describe_settings(setting, plan.material),
        "notes": notes + [note for note in kept if note not in notes],
    }
    modules = module_columns(measured)
    return Records(
        pairs=pair_columns(measured), sample=sample, modules=modules if modules["module"] else None,
        tokens=tokens if summary["tokens"] is not None else None, summary=summary,
    )  # fmt: skip


def _with_start(columns: dict[str, list[Any]], plan: Plan) -> dict[str, list[Any]]:
    """The columns, with the reference's log-probs where it is the model that the run started from."""
    if plan.run is not None and plan.reference.given is None:
        return columns
    none = [None] * len(columns["pair"])
    return {**columns, "ref_chosen_logp": none, "ref_rejected_logp": none}


def _base(reference: ReferenceChoice) -> str | None:
    return None if reference.source is None else reference.source.base


def _describe_run(plan: Plan) -> dict[str, Any] | None:
    if plan.run is None:
        return None
    return {
        "directory": str(plan.run.directory),
        "kind": plan.run.kind,
        "base": plan.run.base,
        "found": [each.step for each in plan.run.checkpoints],
        "asked": [target.step for target in plan.targets],
    }


def _describe_data(setting: Setting, material: Material) -> dict[str, Any]:
    return {
        "source": setting.data,
        "rows": material.rows,
        "measured": len(material.pairs.pairs),
        "skipped": [{"row": bad.row, "where": bad.where, "reason": bad.reason} for bad in material.pairs.skipped],
        "truncated_responses": sum(pair.truncated for pair in material.pairs.pairs),
    }


def _describe_settings(setting: Setting, material: Material) -> dict[str, Any]:
    asked = asdict(setting)
    for elsewhere in ("model", "data", "base", "adapter", "reference", "trust_remote_code"):
        del asked[elsewhere]
    if not isinstance(setting.checkpoints, str):
        asked["checkpoints"] = list(setting.checkpoints)
    return {**asked, "max_length": material.max_length, "add_eos": material.add_eos}


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


def write_records(directory: Path, records: Records, started: float, *, report: bool) -> None:
    """Write the records, the page and the pictures; those of an earlier audit go.

    Args:
        directory: where to.
        records: the tables and the summary.
        started: of the clock, for the seconds that it took.
        report: also write the page and the pictures.
    """
    earlier = [directory / name for name in AUDIT_FILES if name != "pairs.parquet"]
    for path in [*earlier, *(each for kind in ("png", "svg") for each in directory.glob(f"figures/*.{kind}"))]:
        path.unlink(missing_ok=True)  # an earlier audit's must not stand beside this one's pairs
    write_pairs(directory / "pairs.parquet", records.pairs)
    write_sample(directory / "sample.parquet", records.sample)
    if records.modules is not None:
        write_modules(directory / "modules.parquet", records.modules)
    if records.tokens is not None:
        write_tokens(directory / "tokens.parquet", records.tokens)
    seconds = round(time.monotonic() - started, 3)
    write_summary(directory / "summary.json", {**records.summary, "seconds": seconds})
    if report:
        write_audit(directory)
