"""`audit`: prepare, measure, judge, write, print.

What needs torch is imported by the call, so that importing this module (and with it the command line) is quick.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from gradent.audit.table import preview, print_summary, printable
from gradent.errors import GradentWarning, InputError
from gradent.record import CASE_NAMES, Summary, make_directory, write_pairs, write_summary

if TYPE_CHECKING:
    from gradent.audit.data import AuditPair
    from gradent.audit.prepare import Prepared
    from gradent.audit.scan import Scan
    from gradent.losses import Loss
    from gradent.verdict import Verdict

__all__ = ["AuditResult", "audit"]

_SHOWN = 5  # most entangled pairs in the summary
_FILES = ("pairs.parquet", "summary.json")


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit found and where it put it.

    Attributes:
        summary: the contents of `summary.json`.
        pairs_path: `pairs.parquet`; `gradent.record.read_pairs` reads it.
        summary_path: `summary.json`.
    """

    summary: Summary
    pairs_path: Path
    summary_path: Path


def audit(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    loss: str | Loss = "dpo",
    out: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    split: str = "train",
    max_length: int | None = None,
    max_pairs: int | None = None,
    batch_size: int = 8,
    memory_budget: int | str | None = None,
    engine: str = "hooks",
    by_module: bool = False,
    dtype: str = "float32",
    device: str | None = None,
    skip_bad_rows: bool = False,
    add_eos: bool = True,
    trust_remote_code: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> AuditResult:
    """Measure gradient entanglement on every preference pair of a data set and write `pairs.parquet`, `summary.json`.

    Args:
        model: directory or hub id of a causal LM (all its parameters are measured), or of a PEFT adapter.
        data: .jsonl, .json or .parquet file, dataset directory, or hub id, in one of TRL's preference formats.
        loss: a name that `losses.get` knows, with its default hyperparameters, or a `Loss`.
        out: directory for the two files, made where needed; those of an earlier audit there are replaced.
        adapter: PEFT adapter on top of `model`; its parameters are then what is measured.
        reference: directory or hub id of the reference model, for losses with a reference. Without it the base under
            the adapter is the reference, as in TRL; without an adapter the model is its own, as at the first step.
        split: split of a dataset directory or hub dataset.
        max_length: most tokens of prompt + response; the rest of the response is cut, as in TRL. Default: 1024, or
            the model's number of positions if that is smaller.
        max_pairs: measure that many pairs only, drawn at random with `seed`.
        batch_size: most pairs a batch; pairs of like length share one.
        memory_budget: bounds the scratch of the reductions, as in `measure` (bytes, or "512MiB").
        engine: "hooks" or "func", as in `measure`.
        by_module: also sum up which modules the cosine comes from.
        dtype: float32 on every device unless said otherwise: it is TRL's own default, and bfloat16 gradients keep
            three digits, which inner products that cancel do not survive. "auto" is the checkpoint's dtype.
        device: a torch device; by default "cuda" where there is one, else "cpu".
        skip_bad_rows: go on without rows that cannot be used; they are counted and listed.
        add_eos: append EOS to plain-string responses, as TRL's DPOTrainer does.
        trust_remote_code: run code that the model's repository brings.
        seed: of the draw of `max_pairs`.
        quiet: print nothing.

    Returns:
        The summary and the paths of both files.

    Raises:
        InputError: `loss` is neither a name nor a `Loss`.
        GradentError: whatever is wrong with the arguments, the data or the model, with the place and the remedy.
    """
    from gradent import losses  # noqa: PLC0415
    from gradent.audit.prepare import prepare  # noqa: PLC0415
    from gradent.audit.scan import check_scan_settings, scan_pairs  # noqa: PLC0415
    from gradent.verdict import verdict  # noqa: PLC0415

    started = time.monotonic()
    objective = losses.get(loss) if isinstance(loss, str) else loss
    if not isinstance(objective, losses.Loss):
        raise InputError(f"loss is a {type(loss).__name__}; accepted: a name that losses.get knows, or a Loss.")
    check_scan_settings(batch_size=batch_size, engine=engine, memory_budget=memory_budget)
    directory = make_directory(out, _FILES)
    notes: list[str] = []
    tell = _teller(notes, quiet)
    ready = prepare(
        os.fspath(model), data, tell=tell, needs_reference=objective.needs_reference,
        adapter=None if adapter is None else os.fspath(adapter),
        reference=None if reference is None else os.fspath(reference), split=split,
        max_length=max_length, max_pairs=max_pairs, dtype=dtype, device=device, skip_bad_rows=skip_bad_rows,
        add_eos=add_eos, trust_remote_code=trust_remote_code, seed=seed,
    )  # fmt: skip
    with _warnings_told(tell), _progress(ready.pairs.pairs, quiet) as advance:
        scan = scan_pairs(
            ready.model, ready.pairs.pairs, reference=ready.reference, batch_size=batch_size, engine=engine,
            by_module=by_module, memory_budget=memory_budget, advance=advance,
        )  # fmt: skip
    judged = verdict(scan.gram, objective, scan.ref_chosen_logp, scan.ref_rejected_logp)
    settings = {
        "max_length": ready.max_length, "max_pairs": max_pairs, "batch_size": batch_size, "engine": engine,
        "memory_budget": memory_budget, "add_eos": ready.add_eos, "skip_bad_rows": skip_bad_rows, "seed": seed,
        "dtype": dtype, "device": device, "split": split,
    }  # fmt: skip
    columns = _to_columns(ready, scan, judged)
    summary = {
        **_describe(ready, scan, os.fspath(data), None if reference is None else os.fspath(reference)),
        **_figures(columns, ready.pairs.pairs, scan),
        "loss": _describe_loss(objective),
        "settings": settings,
        "notes": notes,
        "seconds": round(time.monotonic() - started, 3),
    }
    result = _write(directory, columns, summary)
    if not quiet:
        print_summary(result.summary, Console())
    return result


def _teller(notes: list[str], quiet: bool) -> Callable[[str], None]:
    console = Console(stderr=True, quiet=quiet)

    def tell(note: str) -> None:
        notes.append(note)
        console.print(Text(f"note: {printable(note)}"), soft_wrap=True)

    return tell


@contextmanager
def _warnings_told(tell: Callable[[str], None]) -> Iterator[None]:
    """What gradent warns of belongs to the record; other warnings go their way."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, GradentWarning):
                tell(str(message))
            else:
                shown(message, category, *place, **more)

        warnings.simplefilter("always", GradentWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _progress(pairs: Sequence[AuditPair], quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over tokens, since a pair's cost goes with its length, with the pairs counted beside it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("measuring"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[done]}/{task.fields[pairs]} pairs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    tokens = sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=tokens, done=0, pairs=len(pairs))

        def advance(count: int, batch_tokens: int) -> None:
            progress.update(task, advance=batch_tokens, done=progress.tasks[task].fields["done"] + count)

        yield advance


def _to_columns(ready: Prepared, scan: Scan, judged: Verdict) -> dict[str, list[Any]]:
    """The columns of `pairs.parquet`; None where there is no cosine or no reference."""
    pairs, gram = ready.pairs.pairs, scan.gram
    entries = ("chosen_sq", "rejected_sq", "inner", "chosen_logp", "rejected_logp", "chosen_len", "rejected_len")
    references = {"ref_chosen_logp": scan.ref_chosen_logp, "ref_rejected_logp": scan.ref_rejected_logp}
    return {
        "checkpoint": [ready.source.name] * len(pairs),
        "step": [ready.step] * len(pairs),
        "pair": [pair.row for pair in pairs],
        **{name: getattr(gram, name).tolist() for name in entries},
        "cosine": [None if value != value else value for value in gram.cosine.tolist()],
        **{name: [None] * len(pairs) if values is None else values.tolist() for name, values in references.items()},
        **{name: getattr(judged, name).tolist() for name in ("d_w", "d_l", "chosen_change", "rejected_change", "case")},
    }


def _describe(ready: Prepared, scan: Scan, data: str, reference: str | None) -> dict[str, Any]:
    parameters = list(ready.model.parameters())
    return {
        "model": {
            "checkpoint": ready.source.name,
            "base": ready.source.base,
            "adapter": ready.source.adapter,
            "step": ready.step,
            "trainable_parameters": sum(each.numel() for each in parameters if each.requires_grad),
            "parameters": sum(each.numel() for each in parameters),
            "coverage": scan.gram.coverage,
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "device": ready.device,
        },
        "reference": {"kind": ready.reference_kind, "source": reference},
        "data": {
            "source": data,
            "rows": ready.rows,
            "measured": len(ready.pairs.pairs),
            "skipped": [{"row": bad.row, "where": bad.where, "reason": bad.reason} for bad in ready.pairs.skipped],
            "truncated_responses": sum(pair.truncated for pair in ready.pairs.pairs),
        },
    }


def _describe_loss(loss: Loss) -> dict[str, Any]:
    values = {each.name: getattr(loss, each.name) for each in fields(loss)}
    return {name: value for name, value in values.items() if isinstance(value, str | int | float)}


def _figures(columns: dict[str, list[Any]], pairs: Sequence[AuditPair], scan: Scan) -> dict[str, Any]:
    from gradent.audit.summary import most_entangled, summarize_columns, summarize_modules  # noqa: PLC0415

    defined = sum(value is not None for value in columns["cosine"])
    modules = {name: sums.tolist() for name, sums in scan.modules.items()}
    return {
        **summarize_columns(columns),
        "most_entangled": [
            {
                "pair": pairs[position].row,
                "where": pairs[position].where,
                "cosine": columns["cosine"][position],
                "case": CASE_NAMES[columns["case"][position]],
                "chosen": preview(pairs[position].chosen_text, pairs[position].rejected_text),
                "rejected": preview(pairs[position].rejected_text, pairs[position].chosen_text),
            }
            for position in most_entangled(columns["cosine"], _SHOWN)
        ],
        "modules": summarize_modules(modules, defined) if modules and defined else None,
    }


def _write(directory: Path, columns: dict[str, list[Any]], summary: dict[str, Any]) -> AuditResult:
    pairs_path, summary_path = (directory / name for name in _FILES)
    summary_path.unlink(missing_ok=True)  # an earlier audit's summary must not stand beside this one's pairs
    write_pairs(pairs_path, columns)
    return AuditResult(summary=write_summary(summary_path, summary), pairs_path=pairs_path, summary_path=summary_path)
