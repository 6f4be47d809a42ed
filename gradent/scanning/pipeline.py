"""One scan from its options to its records: load, scan what the journal lacks, measure a sample, grade, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from gradent import losses
from gradent.auditing.console import make_tell, pair_progress, warnings_as_notes
from gradent.auditing.state.journal import Journal, only_audit
from gradent.auditing.state.targets import ReferenceChoice, Target, choose_reference
from gradent.distributed import Ranks, join
from gradent.errors import InputError
from gradent.kernels.common.budget import parse_budget
from gradent.loading.kinds.quantized import check_quantization
from gradent.loading.models import check_device, check_dtype
from gradent.loading.preferences import AuditPair
from gradent.loading.prepare import choose_device
from gradent.loading.runs.last import last_of_run
from gradent.loading.source import ModelSource, resolve_source
from gradent.record.atomic import make_directory, write_whole
from gradent.record.json_lines import digest
from gradent.record.scans import SCAN_FILES, ScanRecord, read_scan_record, write_scan, write_scan_record
from gradent.report.scan import write_scan_report
from gradent.report.terminal.scan import print_scan
from gradent.scanning.collect import describe_scan, sample_effects, scan_table
from gradent.scanning.config import ScanConfig
from gradent.scanning.material import ScanMaterial, read_scan_material
from gradent.scanning.stages import Scan
from gradent.version import __version__

__all__ = ["run"]

Tell = Callable[[str], None]

_OTHERS = ("summary.json", "demo.json")


def run(config: ScanConfig) -> ScanRecord:
    """Do a scan; returns the record on every rank."""
    started = time.monotonic()
    config = _check(config)
    ranks = join(config.device)
    config = replace(config, quiet=config.quiet or not ranks.is_first)
    notes: list[str] = []
    tell = make_tell(notes, config.quiet)
    config = replace(config, model=last_of_run(config.model, config.adapter, tell))
    source = resolve_source(config.model, config.adapter, quantize=config.quantize)
    target = Target(name=source.name, step=0, source=source)
    reference = choose_reference([target], None, config, tell)
    material = read_scan_material(source, config, tell)
    with only_audit(config.out, ranks):
        scan = _make_scan(config, source, target.identity, material, reference, ranks, tell)
        try:
            _measure(scan)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                f"{config.out} keeps what was scanned. The same command goes on from where this one was stopped."
            ) from interrupt
        finally:
            scan.journal.close()
        if ranks.is_first:
            _write(scan, notes, started)
        ranks.wait()
    record = read_scan_record(config.out / "scan.json")
    if not config.quiet:
        print_scan(record, Console())
    ranks.wait()  # a launcher stops the first rank once another one has gone
    return record


def _check(config: ScanConfig) -> ScanConfig:
    """The options with a `Loss` in place of its name; refuses what no scan can do, before a model is loaded for it."""
    loss = losses.get(config.loss) if isinstance(config.loss, str) else config.loss
    if not isinstance(loss, losses.Loss):
        raise InputError(f"loss is a {type(loss).__name__}; accepted: a name that losses.get knows, or a Loss.")
    if loss.name in losses.DESIGNS:
        raise InputError(
            f"loss is {loss.name}, whose weights hang on more than log-probs, so that they are not known of pairs that "
            "are not measured. Scan with the loss under it (dpo)."
        )
    if config.batch_size < 1:
        raise InputError(f"batch_size is {config.batch_size}; it must be at least 1 (command line: --batch-size).")
    if config.exact is not None and config.exact < 0:
        raise InputError(f"exact is {config.exact}; accepted: a number of pairs, 0 for none, or all (--exact).")
    parse_budget(config.memory_budget)
    for name in _OTHERS:
        if (config.out / name).exists():
            raise InputError(f"{config.out}: holds {name}, the record of another command. Choose another --out.")
    make_directory(config.out, SCAN_FILES)
    check_dtype(config.dtype)
    check_quantization(config.quantize, config.dtype)
    if config.device is not None:
        check_device(config.device)
    return replace(config, loss=loss)


def _make_scan(
    config: ScanConfig, source: ModelSource, identity: str, material: ScanMaterial, reference: ReferenceChoice,
    ranks: Ranks, tell: Tell,
) -> Scan:  # fmt: skip
    device = choose_device(config.device, ranks.local)
    settings = [
        __version__, torch.__version__, config.batch_size, config.memory_budget, config.dtype,
        torch.device(device).type, material.identity,
    ]  # fmt: skip
    said = ranks.gather([settings])
    if any(other != said[0] for other in said):
        raise InputError(
            f"The ranks of this scan would measure different things: {said[0]} on rank 0, and {said} on all. Nothing "
            "was measured. Start all ranks with the same packages, data and kind of device, and with the same command."
        )
    journal = Journal(config.out, digest(["scan", *settings]), ranks.rank)

    return Scan(
        config=config, source=source, material=material, reference=reference, journal=journal, ranks=ranks,
        device=device, model_identity=identity, tell=journal.keeping(tell),
    )  # fmt: skip


def _measure(scan: Scan) -> None:
    """Every stage, as far as the journal lacks it."""
    stages: list[tuple[str, Callable[[Callable[[int, int], None]], None], Sequence[AuditPair], int]] = []
    if scan.reference.source is not None:
        stages.append(("reference", scan.measure_reference, scan.material.pairs, 1))
    stages.append(("scanning", scan.scan, scan.material.pairs, 1))
    if scan.sample:
        stages.append(("exact sample", scan.measure_exactly, scan.sample_pairs, 1))
        stages.append(("step on the sample", scan.measure_steps, scan.sample_pairs, 2))
    with warnings_as_notes(scan.tell):
        for label, stage, pairs, times in stages:
            cost = sum(pair.tokens for pair in pairs)
            with pair_progress(label, times * len(pairs), times * cost, quiet=scan.config.quiet) as advance:
                stage(advance)
            scan.ranks.wait()
            scan.journal.refresh()


def _write(scan: Scan, notes: list[str], started: float) -> None:
    """The records and the page; those of an earlier scan go first."""
    directory: Path = scan.config.out
    for name in SCAN_FILES:
        (directory / name).unlink(missing_ok=True)
    table = scan_table(scan)
    effects = sample_effects(scan) if scan.sample else None
    if effects is not None:
        write_whole(directory / "effects.npy", lambda handle: np.save(handle, effects[0]))
    write_scan(directory / "scan.parquet", table.to_lists())
    record = describe_scan(scan, table, effects, notes)
    write_scan_record(directory / "scan.json", {**record, "seconds": round(time.monotonic() - started, 3)})
    if scan.config.report:
        write_scan_report(directory)
