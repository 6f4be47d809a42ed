"""One audit from its options to its records: find, load, measure what the journal lacks, judge, write."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gradent.auditing.against_trainer import compare_with_trainer
from gradent.auditing.analysis.columns import TargetRecord, collect
from gradent.auditing.analysis.steps import plan_steps
from gradent.auditing.analysis.summary import summarize
from gradent.auditing.console import make_tell, pair_progress, warnings_as_notes
from gradent.auditing.measuring.batches import plan_batches
from gradent.auditing.measuring.sweep import Sweep
from gradent.auditing.measuring.tokens import token_cost
from gradent.auditing.state.agreement import Settings
from gradent.auditing.state.config import AuditConfig
from gradent.auditing.state.journal import Journal, JournalError, only_audit
from gradent.auditing.state.run_loss import choose_loss, read_run_loss
from gradent.auditing.state.targets import AuditPlan, choose_reference, find_targets
from gradent.auditing.write import write_records
from gradent.distributed import Ranks, join
from gradent.errors import GradentError, InputError, ModelError
from gradent.kernels.common.budget import parse_budget
from gradent.loading.kinds.quantized import check_quantization
from gradent.loading.models import check_device, check_dtype
from gradent.loading.prepare import choose_device, read_material
from gradent.record import AUDIT_FILES, Summary, read_summary
from gradent.record.atomic import make_directory
from gradent.report.terminal.audit import print_summary
from gradent.version import __version__

__all__ = ["check", "run"]

Tell = Callable[[str], None]


def run(config: AuditConfig) -> Summary:
    """Do an audit; returns the summary on every rank."""
    started = time.monotonic()
    loss, said = choose_loss(config.loss, config.hyperparameters or {}, read_run_loss(config.model))
    config = replace(config, loss=loss)
    check(config)
    ranks = join(config.device)
    config = replace(config, quiet=config.quiet or not ranks.is_first)
    notes: list[str] = []
    tell = make_tell(notes, config.quiet)
    for note in said:
        tell(note)
    plan = _prepare(config, tell)
    with only_audit(config.out, ranks):
        sweep = _make_sweep(config, plan, ranks, tell)
        try:
            interrupt = _until_interrupt(_measure_targets, sweep)
            sweep.journal.refresh()
            records = collect(plan, sweep.journal, sweep.failures, config.loss)
            if records and interrupt is None and config.attribution:
                interrupt = _until_interrupt(_measure_steps, sweep, records)
            if records and interrupt is None and config.token_pairs is not None:
                interrupt = _until_interrupt(_measure_tokens, sweep, records[-1])
        finally:
            sweep.journal.close()
        if ranks.is_first and (records or interrupt is None):
            complete = interrupt is None and all(record.is_whole for record in records)
            doubt = compare_with_trainer(plan, records, config.loss)
            outcome = summarize(config, plan, records, sweep, notes, doubt=doubt, complete=complete)
            write_records(config, outcome, started)
        if interrupt is not None:
            partial = f"{config.out} holds a partial record. The same command goes on from where this one was stopped."
            kept = f"{config.out} keeps what was measured. The same command goes on from where this one was stopped."
            raise KeyboardInterrupt(partial if ranks.is_first and records else kept) from interrupt
        ranks.wait()
    summary = read_summary(config.out / "summary.json")
    if config.wandb is not None and ranks.is_first:
        from gradent.report.audit.wandb import stream_audit  # noqa: PLC0415  (imports wandb)

        stream_audit(config.out, config.wandb)
    if not config.quiet:
        print_summary(summary, Console())
    ranks.wait()  # a launcher stops the first rank once another one has gone
    return summary


def check(config: AuditConfig) -> None:
    """Refuse what no audit can do, before a model is loaded for it."""
    loss, out = config.loss, config.out
    if getattr(loss, "name", None) == "token_masked":
        raise InputError(
            "loss is token_masked, and an audit measures whole responses, not kept tokens. Audit with the loss under "
            "it (dpo); --token-pairs N then adds a what-if row that keeps the differing tokens alone."
        )
    for name, count in (("batch_size", config.batch_size), ("token_pairs", config.token_pairs)):
        if count is not None and count < 1:
            raise InputError(f"{name} is {count}; it must be at least 1 (command line: --{name.replace('_', '-')}).")
    if config.engine not in {"hooks", "func"}:
        raise InputError(f"engine is {config.engine!r}; accepted: 'hooks' and 'func' (command line: --engine).")
    parse_budget(config.memory_budget)
    if config.wandb is not None and not config.wandb.strip():
        raise InputError("wandb is an empty name; accepted is that of a project (command line: --wandb PROJECT).")
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise InputError("wandb is not installed: pip install wandb, or leave --wandb out.")
    if out.resolve().parent == Path(config.model).resolve() and re.fullmatch(r"checkpoint-\d+", out.name):
        raise InputError(
            f"{out}: is named like a checkpoint of the run, and would be taken for one. Choose another --out."
        )
    if (out / "demo.json").exists():
        raise InputError(f"{out}: holds the records of `gradent demo`, under the same names. Choose another --out.")
    make_directory(out, AUDIT_FILES)
    check_dtype(config.dtype)
    check_quantization(config.quantize, config.dtype)
    if config.device is not None:
        check_device(config.device)


def _prepare(config: AuditConfig, tell: Tell) -> AuditPlan:
    targets, training_run = find_targets(config)
    for note in training_run.notes if training_run is not None else []:
        tell(note)
    reference = choose_reference(targets, training_run, config, tell)
    # The run's own tokenizer is what it trained with, the last one first; a base may lack its chat template.
    sources = [target.source for target in reversed(targets) if target.source is not None]
    material = read_material(sources, config, tell)
    batches = plan_batches(material.pairs.pairs, config.batch_size)
    return AuditPlan(targets=targets, run=training_run, reference=reference, material=material, batches=batches)


def _make_sweep(config: AuditConfig, plan: AuditPlan, ranks: Ranks, tell: Tell) -> Sweep:
    device = choose_device(config.device, ranks.local)
    settings = Settings(
        versions=[__version__, torch.__version__],
        measuring=[config.batch_size, config.memory_budget, config.engine, config.by_module, config.dtype],
        device=torch.device(device).type, pairs=plan.pairs,
        is_in_place=plan.reference.kind == "adapter_off" and plan.reference.source is None,
    )  # fmt: skip
    settings.agree(ranks)
    journal = Journal(config.out, settings.key, ranks.rank)

    failures = {target.name: target.problem for target in plan.targets if target.problem is not None}
    return Sweep(
        config=config,
        plan=plan,
        journal=journal,
        ranks=ranks,
        device=device,
        tell=journal.keeping(tell),
        failures=failures,
    )


def _until_interrupt(measure: Callable[..., None], *arguments: Any) -> KeyboardInterrupt | None:
    """Measure; returns the Ctrl-C that stopped it, since what was measured until then is still to be written."""
    try:
        measure(*arguments)
    except KeyboardInterrupt as interrupt:
        return interrupt
    return None


def _measure_targets(sweep: Sweep) -> None:
    """Measure what the journal lacks of the reference and the targets."""
    plan, quiet = sweep.plan, sweep.config.quiet
    cost = sum(pair.tokens for pair in plan.pairs)
    sound = len(plan.targets) - len(sweep.failures)
    with warnings_as_notes(sweep.tell):
        if plan.reference.source is not None:
            with pair_progress("reference", len(plan.pairs), cost, quiet=quiet) as advance:
                _measure_reference(sweep, advance)
        with pair_progress("measuring", sound * len(plan.pairs), sound * cost, quiet=quiet) as advance:
            sweep.measure_targets(advance)
        for failures in sweep.ranks.gather([sweep.failures]):
            sweep.failures.update(failures)


def _measure_reference(sweep: Sweep, advance: Callable[[int, int], None]) -> None:
    """The reference's log-probs; where they cannot be measured, a loss that can do without is judged all the same."""
    loss = sweep.config.loss
    try:
        sweep.measure_reference(advance)
    except GradentError as error:
        if isinstance(error, JournalError):
            raise
        remedy = "Pass the model that training started from with --base, or another reference with --reference."
        if loss.needs_reference:
            needs = f"The reference, which {loss.name} needs, cannot be measured."
            raise ModelError(f"{needs} {remedy}\n{error}") from error
        sweep.tell(f"The reference cannot be measured, so no loss that needs one is judged. {remedy}\n{error}")


def _measure_steps(sweep: Sweep, records: Sequence[TargetRecord]) -> None:
    """The steps of the targets; what fails here leaves the rest of the record whole."""
    tasks, pairs = plan_steps(records), sweep.plan.pairs
    cost, count = sum(pair.tokens for pair in pairs), len(tasks) + 1
    progress = pair_progress("steps", count * len(pairs), count * cost, quiet=sweep.config.quiet)
    with warnings_as_notes(sweep.tell), progress as advance:
        sweep.measure_steps(tasks, advance)
        if tasks:
            sweep.measure_vectors(tasks[-1].target, advance)
    sweep.ranks.wait()
    sweep.journal.refresh()


def _measure_tokens(sweep: Sweep, last: TargetRecord) -> None:
    """The tokens of the last target; of a run, what fails here leaves the rest of the record whole."""
    pairs = last.spread(sweep.plan.pairs, sweep.config.token_pairs or 0)
    failures = list[str]()
    progress = pair_progress("tokens", len(pairs), sum(map(token_cost, pairs)), quiet=sweep.config.quiet)
    with warnings_as_notes(sweep.tell), progress as advance:
        try:
            sweep.measure_tokens(last.target, pairs, advance)
        except GradentError as error:
            if sweep.plan.run is None or isinstance(error, JournalError):
                raise
            failures.append(str(error))
    failures = sweep.ranks.gather(failures)
    sweep.journal.refresh()
    sweep.token_failures.extend(failures[:1])
