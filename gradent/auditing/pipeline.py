"""One audit from its settings to its records: find, prepare, measure what is left to measure, judge, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from gradent.auditing.account import Plan, Setting, summarize, write_records
from gradent.auditing.console import pair_progress
from gradent.auditing.measuring.batches import plan_batches
from gradent.auditing.measuring.sweep import Sweep
from gradent.auditing.measuring.tokens import token_cost
from gradent.auditing.state.journal import Journal, JournalError, digest
from gradent.auditing.state.ranks import Ranks, join, only_audit
from gradent.auditing.state.targets import Target, choose_reference, find_targets
from gradent.auditing.tell import teller, warnings_told
from gradent.errors import GradentError, ModelError
from gradent.loading.models import check_device, check_dtype
from gradent.loading.preferences import AuditPair
from gradent.loading.prepare import choose_device, read_material
from gradent.losses import Loss
from gradent.record import Summary, read_summary
from gradent.report.terminal.audit import print_summary
from gradent.version import __version__

__all__ = ["Setting", "conduct"]

Tell = Callable[[str], None]


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
            _measure(setting, loss, plan, sweep, quiet)
        except KeyboardInterrupt as interrupt:
            sweep.journal.refresh()
            if not (ranks.first and plan.collect(loss, sweep)):
                raise
            parts = summarize(setting, loss, plan, sweep, notes, complete=False)
            write_records(directory, parts, started, report=report)
            raise KeyboardInterrupt(
                f"{directory} holds a partial record. The same command goes on from where this one was stopped."
            ) from interrupt
        finally:
            sweep.journal.close()
        if ranks.first:
            parts = summarize(setting, loss, plan, sweep, notes, complete=True)
            write_records(directory, parts, started, report=report)
        ranks.wait()
    summary = read_summary(directory / "summary.json")
    if wandb is not None and ranks.first:
        from gradent.report.audit.wandb import stream_audit  # noqa: PLC0415  (imports wandb)

        stream_audit(directory, wandb)
    if not quiet:
        print_summary(summary, Console())
    ranks.wait()  # a launcher stops the first rank once another one has gone
    return summary


def _prepare(setting: Setting, loss: Loss, tell: Tell) -> Plan:
    targets, run = find_targets(
        setting.model, adapter=setting.adapter, base=setting.base, checkpoints=setting.checkpoints
    )
    for note in run.notes if run is not None else []:
        tell(note)
    reference = choose_reference(
        targets, run, setting.reference, needed=loss.name if loss.needs_reference else None, tell=tell
    )
    # The run's own tokenizer is what it trained with, the last one first; a base may lack its chat template.
    sources = [target.source for target in reversed(targets) if target.source is not None]
    material = read_material(
        sources, setting.data, tell=tell, split=setting.split, max_length=setting.max_length,
        max_pairs=setting.max_pairs, skip_bad_rows=setting.skip_bad_rows, add_eos=setting.add_eos,
        trust_remote_code=setting.trust_remote_code, seed=setting.seed,
    )  # fmt: skip
    batches = plan_batches(material.pairs.pairs, setting.batch_size)
    return Plan(targets=targets, run=run, reference=reference, material=material, batches=batches)


def _make_sweep(setting: Setting, plan: Plan, directory: Path, ranks: Ranks, tell: Tell) -> Sweep:
    device = choose_device(setting.device, ranks.local)
    pairs = [[pair.row, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] for pair in plan.material.pairs.pairs]
    # Everything that a number in the journal hangs on, but for the files of models, which each entry is filed under.
    versions = [__version__, torch.__version__]
    measuring = [setting.batch_size, setting.memory_budget, setting.engine, setting.by_module, setting.dtype]
    in_place = plan.reference.kind == "adapter_off" and plan.reference.source is None
    key = digest([versions, measuring, torch.device(device).type, in_place, pairs])
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
        failures={target.name: target.problem for target in plan.targets if target.problem is not None},
    )  # fmt: skip


def _measure(setting: Setting, loss: Loss, plan: Plan, sweep: Sweep, quiet: bool) -> None:
    """Measure what the journal has not."""
    pairs = plan.material.pairs.pairs
    cost = sum(pair.tokens for pair in pairs)
    sound = len(plan.targets) - len(sweep.failures)
    with warnings_told(sweep.tell):
        if plan.reference.source is not None:
            with pair_progress("reference", len(pairs), cost, quiet=quiet) as advance:
                _measure_reference(loss, sweep, advance)
        with pair_progress("measuring", sound * len(pairs), sound * cost, quiet=quiet) as advance:
            sweep.measure_targets(advance)
        shared = sweep.ranks.gather([sweep.failures])
        sweep.failures.update({name: reason for each in shared for name, reason in each.items()})
        sweep.journal.refresh()
        measured = plan.collect(loss, sweep) if setting.token_pairs is not None else []
        if measured and setting.token_pairs is not None:
            last = measured[-1]
            _measure_tokens(last.target, last.spread(pairs, setting.token_pairs), sweep, quiet)


def _measure_reference(loss: Loss, sweep: Sweep, advance: Callable[[int, int], None]) -> None:
    """The reference's log-probs; a loss that can do without is judged all the same."""
    try:
        sweep.measure_reference(advance)
    except JournalError:
        raise
    except GradentError as error:
        remedy = "Pass the model that training started from with --base, or another reference with --reference."
        if loss.needs_reference:
            raise ModelError(
                f"The reference, which {loss.name} needs, cannot be measured. {remedy}\n{error}"
            ) from error
        sweep.tell(f"The reference cannot be measured, so no loss that needs one is judged. {remedy}\n{error}")


def _measure_tokens(target: Target, pairs: Sequence[AuditPair], sweep: Sweep, quiet: bool) -> None:
    """The tokens of the last target; of a run, what fails here leaves the rest of the record whole."""
    failed = list[str]()
    with pair_progress("tokens", len(pairs), sum(map(token_cost, pairs)), quiet=quiet) as advance:
        try:
            sweep.measure_tokens(target, pairs, advance)
        except JournalError:
            raise
        except GradentError as error:
            if not sweep.several:
                raise
            failed.append(str(error))
    failed = sweep.ranks.gather(failed)
    sweep.journal.refresh()
    if failed:
        sweep.token_failures.append(failed[0])
