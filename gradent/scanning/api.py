"""`scan`, what it takes and what it returns; `gradent.scanning.pipeline` does the work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradent.record.scans import ScanRecord
from gradent.scanning.config import ScanConfig

if TYPE_CHECKING:
    from gradent.losses import Loss

__all__ = ["ScanResult", "scan"]


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """What a scan found and where it put it.

    Attributes:
        record: the contents of `scan.json`; its `grades` say how well each stand-in ranks what it stands in for.
        scan_path: `scan.parquet`, a row a pair; `gradent.record.scans.read_scan` reads it.
        record_path: `scan.json`.
        report_path: `report.html`; None with `report=False`.
    """

    record: ScanRecord
    scan_path: Path
    record_path: Path
    report_path: Path | None = None


def scan(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    loss: str | Loss = "dpo",
    adapter: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    split: str = "train",
    max_length: int | None = None,
    truncation_mode: str | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    quantize: str | None = None,
    exact: int | None = 256,
    seed: int = 0,
    head: bool = True,
    batch_size: int = 8,
    memory_budget: int | str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    skip_bad_rows: bool = False,
    add_eos: bool = True,
    trust_remote_code: bool = False,
    report: bool = True,
    quiet: bool = False,
) -> ScanResult:
    """Give every pair of a data set its stand-ins, and say how well each ranks what the exact value ranks.

    One forward a response gives log-probs, implicit rewards, CHES and the head's block of the Gram entries; a sample is
    measured exactly. Findings are appended to `out/journal/` as they come: killed at any point and called again with
    the same arguments, a scan goes on where it was, and its rows are those of an undisturbed one. Under `accelerate
    launch` or `torchrun` the ranks share the batches; `out` must then be one directory that all of them see.

    Args:
        model: directory or hub id of a causal LM, or of a PEFT adapter; what is trainable there is what is measured
            exactly.
        data: .jsonl, .json or .parquet file (.jsonl.gz too), dataset directory, or hub id, in one of TRL's preference
            formats. Every row is scanned.
        out: directory for the records, made where needed; those of an earlier scan there are replaced.
        loss: a name that `losses.get` knows, with its default hyperparameters, or a `Loss`: what the steps are of.
        adapter: PEFT adapter on top of `model`.
        reference: directory or hub id of the reference model. Without it that is the base under an adapter; a model
            without an adapter is its own, as at the first step, and has no implicit rewards.
        split: split of a dataset directory or hub dataset.
        max_length: as in `audit`.
        truncation_mode: as in `audit`.
        max_prompt_length: as in `audit`.
        max_completion_length: as in `audit`.
        quantize: as in `audit`.
        exact: measure that many pairs exactly, one of each of so many slices of like length; None for all, 0 for none.
        seed: of that draw, and of the bootstrap.
        head: also the head's block, which costs about as much as the head itself.
        batch_size: most pairs a batch; pairs of like length share one.
        memory_budget: bounds the scratch of the reductions, as in `measure` (bytes, or "512MiB").
        dtype: float32 on every device unless said otherwise; "auto" is the checkpoint's dtype.
        device: a torch device; by default "cuda" where there is one, else "cpu".
        skip_bad_rows: go on without rows that cannot be used; they are counted and listed.
        add_eos: append EOS to plain-string responses, as TRL's DPOTrainer does.
        trust_remote_code: run code that the model's repository brings.
        report: also write `report.html`.
        quiet: print nothing.

    Returns:
        The record and the paths of the files.

    Raises:
        InputError: an argument is none that is accepted, or another scan is writing to `out`.
        GradentError: whatever is wrong with the data or the model, with the place and the remedy.
        KeyboardInterrupt: it was stopped; what was scanned until then is kept.

    Example:
        >>> gradent.scan("my-model", "pairs.jsonl", out="my-scan").record["grades"]  # doctest: +SKIP
    """
    options = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in locals().items()}
    # What needs torch is imported by the call, so that importing this module, and the command line, is quick.
    from gradent.auditing.early import check_early  # noqa: PLC0415

    config = ScanConfig(**{**options, "out": Path(out)})
    check_early(config.loss, config.data, config.model, config.out, quiet=config.quiet)
    from gradent.scanning.pipeline import run  # noqa: PLC0415

    record = run(config)
    return ScanResult(
        record=record, scan_path=config.out / "scan.parquet", record_path=config.out / "scan.json",
        report_path=config.out / "report.html" if report else None,
    )  # fmt: skip
