"""One audit from its settings to its records: find, prepare, measure what is left to measure, judge, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gradent.audit.checkpoints import Run
from gradent.audit.dynamics import dynamics
from gradent.audit.history import read_history
from gradent.audit.journal import Journal, digest
from gradent.audit.load import check_device, check_dtype
from gradent.audit.prepare import Material, choose_device, read_material
from gradent.audit.progress import pair_progress
from gradent.audit.properties import summarize_properties
from gradent.audit.ranks import Ranks, join, only_audit
from gradent.audit.records import (
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
from gradent.audit.scan import plan_batches
from gradent.audit.sweep import Sweep, pair_cost
from gradent.audit.table import print_summary
from gradent.audit.targets import ReferenceChoice, Target, choose_reference, find_targets
from gradent.audit.tell import teller, warnings_told
from gradent.audit.token_scan import choose_pairs, token_cost
from gradent.audit.token_summary import summarize_tokens
from gradent.audit.what_if import recommend, what_if
from gradent.errors import GradentError, ModelError
from gradent.losses import Loss
from gradent.record import (
    Summary,
    read_summary,
    write_modules,
    write_pairs,
    write_sample,
    write_summary,
    write_tokens,
)
from gradent.version import __version__

__all__ = ["Setting", "conduct"]

Tell = Callable[[str], None]


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
class _Plan:
    """What there is to measure, and what is known of it."""

    targets: list[Target]
    run: Run | None
    reference: ReferenceChoice
    material: Material
    batches: list[list[int]]


def conduct(setting: Setting, loss: Loss, directory: Path, *, report: bool, wandb: str | None, quiet: bool) -> Summary:
    """Do an audit.

    Args:
        setting: what is asked for.
        loss: judges the pairs.
        directory: for the records.
        report: also write the page and the figures.
        wandb: a wandb project to stream the records to.
        quiet: print nothing.

    Returns:
        The summary, on every rank.

    Raises:
        KeyboardInterrupt: it was stopped; a partial record has been written.
    """
    started = time.monotonic()
    check_dtype(setting.dtype)
    if setting.device is not None:
        check_device(setting.device)
    ranks = join(setting.device)
    quiet = quiet or not ranks.first
    notes: list[str] = []
    tell = teller(notes, quiet)
    plan = _prepare(setting, loss, tell)
    with only_audit(directory, ranks):
        sweep = _make_sweep(setting, plan, directory, ranks, tell)
        try:
            failures = _measure(setting, loss, plan, sweep, quiet)
        except KeyboardInterrupt as interrupt:
            sweep.journal.refresh()
            if not (ranks.first and _collect(loss, plan, sweep, {})):
                raise
            parts = _summarize(setting, loss, plan, sweep, {}, notes, complete=False)
            _write(directory, parts, started, report=report)
            raise KeyboardInterrupt(
                f"{directory} holds a partial record. The same command goes on from where this one was stopped."
            ) from interrupt
        finally:
            sweep.journal.close()
        if ranks.first:
            parts = _summarize(setting, loss, plan, sweep, failures, notes, complete=True)
            _write(directory, parts, started, report=report)
        ranks.wait()
    summary = read_summary(directory / "summary.json")
    if wandb is not None and ranks.first:
        from gradent.report.audit_wandb import stream_audit  # noqa: PLC0415  (imports wandb)

        stream_audit(directory, wandb)
    if not quiet:
        print_summary(summary, Console())
    return summary


def _prepare(setting: Setting, loss: Loss, tell: Tell) -> _Plan:
    targets, run = find_targets(
        setting.model, adapter=setting.adapter, base=setting.base, checkpoints=setting.checkpoints
    )
    for note in run.notes if run is not None else []:
        tell(note)
    reference = choose_reference(
        targets, run, setting.reference, needed=loss.name if loss.needs_reference else None, tell=tell
    )
    source = next(target.source for target in targets if target.source is not None)
    material = read_material(
        source, setting.data, tell=tell, split=setting.split, max_length=setting.max_length,
        max_pairs=setting.max_pairs, skip_bad_rows=setting.skip_bad_rows, add_eos=setting.add_eos,
        trust_remote_code=setting.trust_remote_code, seed=setting.seed,
    )  # fmt: skip
    batches = plan_batches(material.pairs.pairs, setting.batch_size)
    return _Plan(targets=targets, run=run, reference=reference, material=material, batches=batches)


def _make_sweep(setting: Setting, plan: _Plan, directory: Path, ranks: Ranks, tell: Tell) -> Sweep:
    device = choose_device(setting.device, ranks.local)
    pairs = [[pair.row, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] for pair in plan.material.pairs.pairs]
    # Everything that a number in the journal hangs on, but for the files of models, which each entry is filed under.
    versions = [__version__, torch.__version__]
    measuring = [setting.batch_size, setting.memory_budget, setting.engine, setting.by_module, setting.dtype]
    key = digest([versions, measuring, torch.device(device).type, plan.reference.kind, pairs])
    journal = Journal(directory, key, ranks.rank)

    def tell_and_keep(note: str) -> None:
        """What is said while measuring is part of the record, even if another process did this part of it."""
        if journal.find("note", note) is None:
            journal.append("note", note, 0, {"text": note})
            tell(note)

    return Sweep(
        targets=plan.targets, reference=plan.reference, material=plan.material, batches=plan.batches, journal=journal,
        ranks=ranks, device=device, dtype=setting.dtype, engine=setting.engine, by_module=setting.by_module,
        memory_budget=setting.memory_budget, trust_remote_code=setting.trust_remote_code,
        several=plan.run is not None, tell=tell_and_keep,
    )  # fmt: skip


def _measure(setting: Setting, loss: Loss, plan: _Plan, sweep: Sweep, quiet: bool) -> dict[str, str]:
    """Measure what the journal has not; why targets are left out, by name."""
    pairs = plan.material.pairs.pairs
    cost = sum(map(pair_cost, pairs))
    targets = [target for target in plan.targets if target.problem is None]
    sweep.agree_on_prices()
    with warnings_told(sweep.tell):
        if plan.reference.source is not None:
            with pair_progress("reference", len(pairs), cost, quiet=quiet) as advance:
                sweep.measure_reference(advance)
        with pair_progress("measuring", len(targets) * len(pairs), len(targets) * cost, quiet=quiet) as advance:
            own = sweep.measure_targets(advance)
        failures = {name: reason for each in sweep.ranks.gather([own]) for name, reason in each.items()}
        sweep.journal.refresh()
        measured = _collect(loss, plan, sweep, failures)
        if measured and setting.token_pairs is not None:
            cosines = measured[-1].columns["cosine"]
            chosen = [pairs[position] for position in choose_pairs(cosines, setting.token_pairs)]
            with pair_progress("tokens", len(chosen), sum(map(token_cost, chosen)), quiet=quiet) as advance:
                sweep.measure_tokens(measured[-1].target, cosines, setting.token_pairs, advance)
            sweep.ranks.wait()
            sweep.journal.refresh()
    return failures


def _collect(loss: Loss, plan: _Plan, sweep: Sweep, failures: dict[str, str]) -> list[Measured]:
    targets = [target for target in plan.targets if target.name not in failures]
    return collect(targets, plan.reference, plan.batches, plan.material.pairs.pairs, sweep.journal, loss)


def _summarize(
    setting: Setting,
    loss: Loss,
    plan: _Plan,
    sweep: Sweep,
    failures: dict[str, str],
    notes: list[str],
    *,
    complete: bool,
) -> _Records:
    """The tables and the summary of what was measured."""
    failures = {target.name: target.problem for target in plan.targets if target.problem is not None} | failures
    measured = _collect(loss, plan, sweep, failures)
    if not measured:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in failures.items())
        raise ModelError(f"{setting.model}: no checkpoint could be measured.{listed}")
    pairs, last = plan.material.pairs.pairs, measured[-1]
    columns, sample = pair_columns(measured), sample_columns(pairs)
    tokens = token_columns(last.target, pairs, sweep.journal) if setting.token_pairs is not None else None
    rows = what_if(columns, loss)
    history = _read_history(plan.run, notes)
    kept = [each["text"] for each in sweep.journal.all("note")]
    summary = {
        "complete": complete,
        "run": _describe_run(plan),
        "left_out": [
            {"checkpoint": target.name, "step": target.step, "reason": failures[target.name]}
            for target in plan.targets
            if target.name in failures
        ],
        "checkpoints": describe_checkpoints(measured),
        "history": history,
        "dynamics": dynamics(columns, {} if history is None else history["curves"]),
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
    return _Records(
        pairs=columns, sample=sample, modules=modules if modules["module"] else None,
        tokens=tokens if summary["tokens"] is not None else None, summary=summary,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Records:
    """What is about to be written."""

    pairs: dict[str, list[Any]]
    sample: dict[str, list[Any]]
    modules: dict[str, list[Any]] | None
    tokens: dict[str, list[Any]] | None
    summary: dict[str, Any]


def _base(reference: ReferenceChoice) -> str | None:
    return None if reference.source is None else reference.source.base


def _describe_run(plan: _Plan) -> dict[str, Any] | None:
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


def _write(directory: Path, records: _Records, started: float, *, report: bool) -> None:
    names = ("summary.json", "report.html", "sample.parquet", "modules.parquet", "tokens.parquet")
    for name in names:
        (directory / name).unlink(missing_ok=True)  # an earlier audit's must not stand beside this one's pairs
    write_pairs(directory / "pairs.parquet", records.pairs)
    write_sample(directory / "sample.parquet", records.sample)
    if records.modules is not None:
        write_modules(directory / "modules.parquet", records.modules)
    if records.tokens is not None:
        write_tokens(directory / "tokens.parquet", records.tokens)
    seconds = round(time.monotonic() - started, 3)
    write_summary(directory / "summary.json", {**records.summary, "seconds": seconds})
    if report:
        from gradent.report.audit import write_audit_report  # noqa: PLC0415  (imports jinja2 and plotly)
        from gradent.report.audit_figures import write_audit_figures  # noqa: PLC0415  (imports matplotlib)

        write_audit_report(directory)
        write_audit_figures(directory)
