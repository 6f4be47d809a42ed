"""An audit's record under another loss: the gradients are the model's, not the loss's, so nothing is measured anew."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradent import losses
from gradent.auditing.analysis.columns import judge, with_verdict, without_references
from gradent.auditing.analysis.distributions import summarize_columns
from gradent.auditing.analysis.dynamics import dynamics
from gradent.auditing.analysis.loss_grid import label_loss, read_hyperparameters
from gradent.auditing.analysis.recommendation import find_foretold, recommend
from gradent.auditing.analysis.what_if import what_if
from gradent.auditing.state.run_loss import choose_loss, read_run_loss
from gradent.errors import InputError
from gradent.record import (
    AUDIT_FILES,
    CASE_NAMES,
    read_pairs,
    read_summary,
    read_tokens,
    write_pairs,
    write_summary,
)
from gradent.record.atomic import make_directory
from gradent.record.table import Table, stack
from gradent.report.rebuild import write_audit

__all__ = ["rejudge"]

_OF_THE_LOSS = ("The loss is the run's own", "The run was trained with", "IPO is judged", "Judged again under")
_BY_THE_LOSS = ("chosen_sample_sign", "rejected_sample_sign", "chosen_sample_signed", "rejected_sample_signed")


def rejudge(directory: Path, asked: str | losses.Loss, out: Path, **hyper: float) -> Path:
    """Write to `out` what an audit in `directory` says under another loss, named as `audit` takes it; returns `out`."""
    summary: dict[str, Any] = {**read_summary(directory / "summary.json")}
    if out.resolve() == directory.resolve():
        raise InputError(f"--out {out}: is the audit's own directory, which stays as it is. Choose another.")
    place = None if summary["run"] is None else Path(summary["run"]["directory"])
    loss, said = choose_loss(asked, hyper, read_run_loss(str(place)) if place is not None and place.is_dir() else None)
    table = Table.read(read_pairs(directory / "pairs.parquet").to_pydict())
    if loss.needs_reference and np.isnan(table["ref_chosen_logp"]).any():
        raise InputError(
            f"--loss {loss.name}: it needs a reference's log-probs, and {directory} has none. Audit again with "
            "--reference, or with the base of the run."
        )
    make_directory(out, AUDIT_FILES)
    steps = [int(step) for step in dict.fromkeys(table["step"].tolist())]
    measured = [table.select(table["step"] == step) for step in steps]
    checkpoints = [with_verdict(each, judge(each, loss)) for each in measured]
    pairs, last = stack(checkpoints), checkpoints[-1]
    most = max(checkpoint.rows for checkpoint in checkpoints)
    whole = stack([checkpoint for checkpoint in checkpoints if checkpoint.rows == most])
    path = directory / "tokens.parquet"
    tokens = Table.read(read_tokens(path).to_pydict()) if path.exists() else None
    rows = what_if(whole, loss, tokens)
    history = summary["history"]
    # The reference is where the run began only if the audit took it for that.
    had_start = (summary["dynamics"] or {}).get("start") is not None
    curves = {} if history is None else history["curves"]
    moved = dynamics(whole if had_start else without_references(whole), curves)
    repeated = int((summary["recommendation"] or {}).get("repeated") or 0)
    note = (
        f"Judged again under {label_loss(loss)}, from the record of {directory}, which is under "
        f"{summary['loss']['name']}. Nothing was measured anew; what a step on the whole sample does is left out, "
        "which was measured for that loss."
    )
    summary |= {
        "checkpoints": [
            {**checkpoint, **summarize_columns(judged)}
            for checkpoint, judged in zip(summary["checkpoints"], checkpoints, strict=True)
        ],
        "dynamics": moved, "steps": _without_the_loss(summary["steps"]), "what_if": rows,
        "recommendation": recommend(
            rows, find_foretold(None, moved, is_sample=False), (repeated, summary["data"]["measured"])
        ),
        **summarize_columns(last), "most_entangled": _with_cases(summary["most_entangled"], last),
        "loss": {"name": loss.name, **read_hyperparameters(loss)},
        "notes": [note, *said, *(each for each in summary["notes"] if not each.startswith(_OF_THE_LOSS))],
    }  # fmt: skip
    for name in ("sample.parquet", "modules.parquet", "tokens.parquet"):
        if (directory / name).exists():
            shutil.copyfile(directory / name, out / name)
    write_pairs(out / "pairs.parquet", pairs.to_lists())
    write_summary(out / "summary.json", summary)
    write_audit(out)
    return out


def _without_the_loss(steps: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What was found between checkpoints, which is the run's whatever the loss that is asked about."""
    if steps is None or not steps["intervals"]:
        return None
    intervals = [{**interval, **dict.fromkeys(_BY_THE_LOSS)} for interval in steps["intervals"]]
    return {**steps, "sample": [], "what_if": None, "pushed": [], "intervals": intervals}


def _with_cases(rows: list[dict[str, Any]], last: Table) -> list[dict[str, Any]]:
    cases = dict(zip(last["pair"].tolist(), last["case"].tolist(), strict=True))
    return [{**row, "case": CASE_NAMES[cases[row["pair"]]]} for row in rows]
