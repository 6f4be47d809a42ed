"""`audit`, what it takes and what it returns; `gradent.auditing.pipeline` does the work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradent.auditing.state.config import AuditConfig
from gradent.record import AUDIT_FILES, Summary
from gradent.report.page.unit import check_lr

if TYPE_CHECKING:
    from gradent.losses import Loss

__all__ = ["AuditResult", "audit"]


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit found and where it put it.

    Attributes:
        summary: the contents of `summary.json`; its `left_out` names checkpoints that could not be measured.
        pairs_path: `pairs.parquet`; `gradent.record.read_pairs` reads it.
        summary_path: `summary.json`.
        sample_path: `sample.parquet`, the texts of the pairs; `gradent.record.read_sample` reads it.
        steps_path: `steps.parquet`, which `gradent.record.read_steps` reads; None with `attribution=False`.
        modules_path: `modules.parquet`, which `gradent.record.read_modules` reads; None with `by_module=False`.
        tokens_path: `tokens.parquet`, which `gradent.record.read_tokens` reads; None where no tokens were measured.
        report_path: `report.html`; None with `report=False`.
    """

    summary: Summary
    pairs_path: Path
    summary_path: Path
    sample_path: Path
    steps_path: Path | None = None
    modules_path: Path | None = None
    tokens_path: Path | None = None
    report_path: Path | None = None


def audit(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    loss: str | Loss | None = None,
    hyperparameters: Mapping[str, float] | None = None,
    out: str | os.PathLike[str],
    checkpoints: str | Sequence[int] = "all",
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
    split: str = "train",
    max_length: int | None = None,
    truncation_mode: str | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_pairs: int | None = 256,
    token_pairs: int | None = None,
    batch_size: int = 8,
    memory_budget: int | str | None = None,
    engine: str = "hooks",
    by_module: bool = True,
    attribution: bool = True,
    lr: float | None = None,
    dtype: str = "float32",
    device: str | None = None,
    skip_bad_rows: bool = False,
    add_eos: bool = True,
    trust_remote_code: bool = False,
    seed: int = 0,
    report: bool = True,
    wandb: str | None = None,
    quiet: bool = False,
) -> AuditResult:
    """Measure gradient entanglement on preference pairs, at every checkpoint of a finished run or on one model.

    Findings are appended to `out/journal/` as they come. Killed at any point and called again with the same arguments,
    an audit goes on where it was, and its records are those of an undisturbed one. Under `accelerate launch` or
    `torchrun` the ranks share the batches; `out` must then be one directory that all of them see.

    Args:
        model: directory of a TRL run (it holds `checkpoint-*`: full models or PEFT adapters), or directory or hub id of
            a causal LM (all its parameters are measured), or of a PEFT adapter (its parameters are).
        data: .jsonl, .json or .parquet file, dataset directory, or hub id, in one of TRL's preference formats.
        loss: a name that `losses.get` knows, with its default hyperparameters, or a `Loss`. Default: the loss that the
            run was trained with, where its training_args.bin says (TRL's DPOTrainer), else "dpo". "ipo" of a run is
            TRL's, averaged over tokens.
        hyperparameters: of the loss that is named, or of the run's own, such as `{"beta": 0.5}`.
        out: directory for the records, made where needed; those of an earlier audit there are replaced or removed, its
            journal is kept.
        checkpoints: of a run, "all", "last", or steps ("0,200,400" or a sequence); 0 is the model before training.
        base: of a run, the model that it started from, where its files do not say or have moved.
        adapter: PEFT adapter on top of `model`; its parameters are then what is measured.
        reference: directory or hub id of the reference model, for losses with a reference. Without it that is the model
            that a run started from, or the base under an adapter, as in TRL; a single model without an adapter is its
            own, as at the first step.
        quantize: quantize the base under adapters while it is loaded, where the run did so: "nf4", "nf4-double",
            "fp4", "fp4-double", "int8" (bitsandbytes) or "torchao-int8". A base that was saved quantized needs it not.
        split: split of a dataset directory or hub dataset.
        max_length: most tokens of prompt + response. Default: what the run's training_args.bin says, else 1024, or
            the model's number of positions if that is smaller.
        truncation_mode: which end of a longer row is kept, "keep_start" or "keep_end", as TRL calls it. Default: what
            the run's training_args.bin says, else "keep_start" (of TRL up to 0.28, "keep_end").
        max_prompt_length: most tokens of a prompt, whose end is kept, in runs of TRL up to 0.28. Default: the run's.
        max_completion_length: most tokens of a response, whose start is kept, in such runs. Default: the run's.
        max_pairs: measure that many pairs only, the same on every checkpoint: one of each of so many slices of like
            length, drawn with `seed`. None for all.
        token_pairs: also measure the token matrices of that many pairs (all, if there are no more) on the last
            checkpoint and write `tokens.parquet`. They stand for the data: the middles of so many equal slices of the
            measured pairs sorted by cosine, with no chance in it. `measure_tokens` does it, whatever the `engine`. None
            for no tokens.
        batch_size: most pairs a batch; pairs of like length share one.
        memory_budget: bounds the scratch of the reductions, as in `measure` (bytes, or "512MiB").
        engine: "hooks" or "func", as in `measure`.
        by_module: also sum up which modules the cosine comes from, and write `modules.parquet`.
        attribution: also say what steps do to every response, to first order, and write `steps.parquet`: the run's own
            steps between checkpoints (`⟨g_i, Δθ⟩` at both ends), and one step of each loss on the mean over the whole
            sample, which the recommendation then speaks of. About two more passes over the pairs a checkpoint.
        dtype: float32 on every device unless said otherwise: it is TRL's own default, and bfloat16 gradients keep
            three digits, which inner products that cancel do not survive. "auto" is the checkpoint's dtype.
        device: a torch device; by default "cuda" where there is one, else "cpu".
        skip_bad_rows: go on without rows that cannot be used; they are counted and listed.
        add_eos: append EOS to plain-string responses, as TRL's DPOTrainer does.
        trust_remote_code: run code that the model's repository brings.
        seed: of the draw of `max_pairs`.
        lr: show what a step of plain gradient descent does in nats at this learning rate. Default: nats per unit of it.
            Adam's steps have another size, so its rate says little here.
        report: also write `report.html` and `figures/`.
        wandb: a wandb project to stream the records to.
        quiet: print nothing.

    Returns:
        The summary and the paths of the files.

    Raises:
        InputError: `loss` is neither a name nor a `Loss`, or another audit or scan is writing to `out`.
        GradentError: whatever is wrong with the arguments, the data or the model, with the place and the remedy. A
            checkpoint of a run that cannot be measured raises nothing: it is told of and listed in the summary's
            `left_out`, unless none can.
        KeyboardInterrupt: it was stopped; what was measured until then has been written as a partial record.
    """
    check_lr(lr)
    options = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in locals().items()}
    config = AuditConfig(**{**options, "out": Path(out)})
    # What takes time to import is imported by the call, so that the command line is quick; torch comes last.
    from gradent.auditing.early import check_early  # noqa: PLC0415

    check_early(config.loss, config.data, config.model, config.out, quiet=config.quiet)
    from gradent.auditing.pipeline import run  # noqa: PLC0415

    summary = run(config)
    paths = {name: config.out / name for name in AUDIT_FILES}
    return AuditResult(
        summary=summary, pairs_path=paths["pairs.parquet"], summary_path=paths["summary.json"],
        sample_path=paths["sample.parquet"],
        steps_path=paths["steps.parquet"] if summary["steps"] is not None else None,
        modules_path=paths["modules.parquet"] if summary["modules"] is not None else None,
        tokens_path=paths["tokens.parquet"] if summary["tokens"] is not None else None,
        report_path=paths["report.html"] if report else None,
    )  # fmt: skip
