"""`audit`: prepare, measure, judge, write, print.

What needs torch is imported by the call, so that importing this module (and with it the command line) is quick.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gradent.audit.progress import pair_progress
from gradent.audit.table import preview, print_summary
from gradent.audit.tell import teller, warnings_told
from gradent.errors import InputError
from gradent.files import make_directory
from gradent.record import CASE_NAMES, Summary, write_pairs, write_summary, write_tokens

if TYPE_CHECKING:
    from gradent.audit.data import AuditPair
    from gradent.audit.prepare import Prepared
    from gradent.audit.scan import Scan
    from gradent.losses import Loss
    from gradent.verdict import Verdict

__all__ = ["AuditResult", "audit"]

_SHOWN = 5  # most entangled pairs in the summary
_FILES = ("pairs.parquet", "summary.json", "tokens.parquet")


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit found and where it put it.

    Attributes:
        summary: the contents of `summary.json`.
        pairs_path: `pairs.parquet`; `gradent.record.read_pairs` reads it.
        summary_path: `summary.json`.
        tokens_path: `tokens.parquet`, which `gradent.record.read_tokens` reads; None where no tokens were measured.
    """

    summary: Summary
    pairs_path: Path
    summary_path: Path
    tokens_path: Path | None = None


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
    token_pairs: int | None = None,
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
        out: directory for the files, made where needed; those of an earlier audit there are replaced or removed.
        adapter: PEFT adapter on top of `model`; its parameters are then what is measured.
        reference: directory or hub id of the reference model, for losses with a reference. Without it the base under
            the adapter is the reference, as in TRL; without an adapter the model is its own, as at the first step.
        split: split of a dataset directory or hub dataset.
        max_length: most tokens of prompt + response; the rest of the response is cut, as in TRL. Default: 1024, or
            the model's number of positions if that is smaller.
        max_pairs: measure that many pairs only, drawn at random with `seed`.
        token_pairs: also measure the token matrices of that many pairs (all, if there are no more) and write
            `tokens.parquet`. They stand for the data: the middles of so many equal slices of the measured pairs sorted
            by cosine, with no chance in it. `measure_tokens` does it, whatever the `engine`. None for no tokens.
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
        The summary and the paths of the files.

    Raises:
        InputError: `loss` is neither a name nor a `Loss`.
        GradentError: whatever is wrong with the arguments, the data or the model, with the place and the remedy.
    """
    from gradent import losses  # noqa: PLC0415
    from gradent.audit.prepare import prepare  # noqa: PLC0415
    from gradent.audit.scan import check_scan_settings, scan_pairs  # noqa: PLC0415
    from gradent.audit.token_scan import check_token_pairs  # noqa: PLC0415
    from gradent.audit.token_summary import summarize_tokens  # noqa: PLC0415
    from gradent.verdict import verdict  # noqa: PLC0415

    started = time.monotonic()
    objective = losses.get(loss) if isinstance(loss, str) else loss
    if not isinstance(objective, losses.Loss):
        raise InputError(f"loss is a {type(loss).__name__}; accepted: a name that losses.get knows, or a Loss.")
    check_scan_settings(batch_size=batch_size, engine=engine, memory_budget=memory_budget)
    check_token_pairs(token_pairs)
    directory = make_directory(out, _FILES)
    notes: list[str] = []
    tell = teller(notes, quiet)
    ready = prepare(
        os.fspath(model), data, tell=tell, needs_reference=objective.needs_reference,
        adapter=None if adapter is None else os.fspath(adapter),
        reference=None if reference is None else os.fspath(reference), split=split,
        max_length=max_length, max_pairs=max_pairs, dtype=dtype, device=device, skip_bad_rows=skip_bad_rows,
        add_eos=add_eos, trust_remote_code=trust_remote_code, seed=seed,
    )  # fmt: skip
    pairs = ready.pairs.pairs
    with warnings_told(tell), pair_progress("measuring", len(pairs), _cost(pairs), quiet=quiet) as advance:
        scan = scan_pairs(
            ready.model, pairs, reference=ready.reference, batch_size=batch_size, engine=engine,
            by_module=by_module, memory_budget=memory_budget, advance=advance,
        )  # fmt: skip
    judged = verdict(scan.gram, objective, scan.ref_chosen_logp, scan.ref_rejected_logp)
    settings = {
        "max_length": ready.max_length, "max_pairs": max_pairs, "token_pairs": token_pairs, "batch_size": batch_size,
        "engine": engine, "memory_budget": memory_budget, "add_eos": ready.add_eos, "skip_bad_rows": skip_bad_rows,
        "seed": seed, "dtype": dtype, "device": device, "split": split,
    }  # fmt: skip
    columns, tokens = _to_columns(ready, scan, judged), None
    if token_pairs is not None:
        with warnings_told(tell):
            tokens = _measure_tokens(ready, columns, token_pairs, memory_budget, quiet)
    summary = {
        **_describe(ready, scan, os.fspath(data), None if reference is None else os.fspath(reference)),
        **_figures(columns, pairs, scan),
        "tokens": None if tokens is None else summarize_tokens(tokens, columns),
        "loss": _describe_loss(objective),
        "settings": settings,
        "notes": notes,
        "seconds": round(time.monotonic() - started, 3),
    }
    result = _write(directory, columns, tokens, summary)
    if not quiet:
        print_summary(result.summary, Console())
    return result


def _cost(pairs: Sequence[AuditPair]) -> int:
    """Tokens of all rows, which is what `scan_pairs` reports as done."""
    return sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)


def _measure_tokens(
    ready: Prepared, columns: dict[str, list[Any]], count: int, memory_budget: int | str | None, quiet: bool
) -> dict[str, list[Any]]:
    """The columns of `tokens.parquet`, for `count` of the pairs that `columns` holds."""
    from gradent.audit.token_scan import choose_pairs, scan_tokens, token_cost  # noqa: PLC0415

    pairs = [ready.pairs.pairs[position] for position in choose_pairs(columns["cosine"], count)]
    with pair_progress("tokens", len(pairs), sum(map(token_cost, pairs)), quiet=quiet) as advance:
        tokens = scan_tokens(ready.model, ready.tokenizer, pairs, memory_budget=memory_budget, advance=advance)
    rows = len(tokens["pair"])
    return {"checkpoint": [ready.source.name] * rows, "step": [ready.step] * rows, **tokens}


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
    return {
        "model": {**ready.describe_model(), "coverage": scan.gram.coverage},
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


def _write(
    directory: Path, columns: dict[str, list[Any]], tokens: dict[str, list[Any]] | None, summary: dict[str, Any]
) -> AuditResult:
    pairs_path, summary_path, tokens_path = (directory / name for name in _FILES)
    for path in (summary_path, tokens_path):
        path.unlink(missing_ok=True)  # an earlier audit's must not stand beside this one's pairs
    write_pairs(pairs_path, columns)
    if tokens is not None:
        write_tokens(tokens_path, tokens)
    return AuditResult(
        summary=write_summary(summary_path, summary),
        pairs_path=pairs_path,
        summary_path=summary_path,
        tokens_path=None if tokens is None else tokens_path,
    )
