"""An audit as one wandb run, from its records alone: curves over the run's steps, tables, the page and the files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradent.errors import GradentError, InputError
from gradent.record import AUDIT_FILES
from gradent.report.audit.sections.losses import describe_row
from gradent.report.audit.sections.pairs import ranked_pairs
from gradent.report.audit.sections.records import AuditRecords, Measured, read_audit
from gradent.report.page.cases import CASES, share_of
from gradent.text import printable

__all__ = ["stream_audit"]

_STEP = "gradent/step"
_PAIRS = 50  # of the table of pairs
_LONGEST = 2000  # characters of a text in it
_SIDES = ("chosen", "rejected")
_MEANS = ("chosen_logp", "rejected_logp", "chosen_change", "rejected_change")


def stream_audit(directory: str | os.PathLike[str], project: str, *, name: str | None = None) -> str:
    """Send an audit's records to wandb as one run."""
    records = read_audit(directory)
    try:
        import wandb  # noqa: PLC0415
    except ImportError as error:
        raise InputError("Streaming to wandb needs wandb, which is not installed: pip install wandb.") from error
    if wandb.run is not None:
        raise InputError(
            f"A wandb run is active ({wandb.run.name}), and an audit is a run of its own. Call wandb.finish() first."
        )
    try:
        name = name or printable(records.name)
        run = wandb.init(project=project, name=name, job_type="audit", config=_config(records))
        try:
            _log(wandb, run, records)
        finally:
            place = str(run.url or Path(run.dir).parent)
            run.finish()
    except wandb.Error as error:
        raise GradentError(f"wandb did not take the audit in {directory}: {error}") from error
    return place


def _log(wandb: Any, run: Any, records: AuditRecords) -> None:
    run.define_metric(_STEP)
    run.define_metric("gradent/*", step_metric=_STEP)
    for row in _rows(records):
        run.log(row)
    tables = {
        "gradent/what_if": _loss_table(wandb, records), "gradent/pairs": _pair_table(wandb, records),
        "gradent/pushed": _push_table(wandb, records),
    }  # fmt: skip
    shown: dict[str, Any] = {key: table for key, table in tables.items() if table is not None}
    page = records.directory / "report.html"
    if page.is_file():
        shown["gradent/report"] = wandb.Html(page.read_text("utf-8"), inject=False)
    if shown:
        run.log({**shown, _STEP: records.last.step if records.last else 0})
    text = (records.summary["recommendation"] or {}).get("text")
    values = {
        "gradent/recommendation": text and printable(str(text)),
        "gradent/onset": records.of_dynamics("onset").get("measured"),
        "gradent/complete": records.summary["complete"],
    }
    for key, value in values.items():
        if value is not None:
            run.summary[key] = value
    artifact_name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"audit-{run.id}")
    metadata = {"complete": records.summary["complete"]}
    artifact = wandb.Artifact(artifact_name, type="gradent-audit", metadata=metadata)
    for file in AUDIT_FILES:
        if (records.directory / file).is_file():
            artifact.add_file(str(records.directory / file))
    for path in sorted((records.directory / "figures").glob("*.*")):
        artifact.add_file(str(path), name=f"figures/{path.name}")
    run.log_artifact(artifact)


def _rows(records: AuditRecords) -> Iterator[dict[str, float]]:
    """A row a step: what was measured there, what was logged there, or both."""
    rows: dict[float, dict[str, float]] = {}
    for key, points in records.logged.items():
        for step, value in points:
            if step is not None and value is not None:
                rows.setdefault(float(step), {})[f"gradent/logged/{printable(key)}"] = float(value)
    for measured in records.measured:
        rows.setdefault(float(measured.step), {}).update(_measured(measured))
    for step, row in _steps(records):
        rows.setdefault(step, {}).update(row)
    yield from ({_STEP: step, **row} for step, row in sorted(rows.items()))


def _measured(measured: Measured) -> dict[str, float]:
    row = {
        "gradent/cosine": measured.mean("cosine"),
        "gradent/cosine_median": measured.quantile("cosine", 0.5),
        **{f"gradent/case/{case}": measured.share(case) for case in CASES},
        **{f"gradent/{column}": measured.mean(column) for column in _MEANS},
        "gradent/pairs_measured": float(len(measured.pairs)),
    }
    return {key: value for key, value in row.items() if math.isfinite(value)}


def _steps(records: AuditRecords) -> Iterator[tuple[float, dict[str, float]]]:
    """What a step on the sample does at each checkpoint, and what moved the responses on the way there."""
    steps = records.summary["steps"] or {}
    for row in steps.get("sample") or []:
        names = [f"{side}_{part}" for side in _SIDES for part in ("own", "partner", "others")]
        found = {f"gradent/sample/{name.replace('_', '/')}": row.get(name) for name in names}
        found["gradent/sample/case/ideal"] = share_of(row.get("cases"), "ideal")
        yield float(row["step"]), {key: value for key, value in found.items() if value is not None}
    for row in steps.get("intervals") or []:
        names = [f"{side}_{kind}" for side in _SIDES for kind in ("realised", "first_order")]
        found = {f"gradent/interval/{name}": row.get(name) for name in (*names, "explained")}
        yield float(row["to"]), {key: value for key, value in found.items() if value is not None}


def _push_table(wandb: Any, records: AuditRecords) -> Any:
    """The responses that other pairs move most in a step on the sample, and by whom."""
    data = []
    for row in (records.summary["steps"] or {}).get("pushed") or []:
        for by in row["by"]:
            names = [f"{part['side']} of pair {part['pair']}" for part in (row, by)]
            texts = [
                printable(str(records.sample.get(part["pair"], {}).get(part["side"], "")))[:_LONGEST]
                for part in (row, by)
            ]
            data.append([names[0], texts[0], row["others"], names[1], texts[1], by["moved"]])
    columns = ["response", "text", "by other pairs", "by", "its text", "of it"]
    return wandb.Table(columns=columns, data=data) if data else None


def _loss_table(wandb: Any, records: AuditRecords) -> Any:
    rows = records.summary["what_if"]
    if not rows:
        return None
    figures = ("ratio", "needs_at_least", "needs_at_most", "within")
    data = [
        [
            printable(describe_row(row)), str(row.get("group")), row.get("pairs"),
            share_of((row.get("sample") or {}).get("cases"), "ideal"),
            *(share_of(row.get("cases"), case) for case in CASES), *(row.get(figure) for figure in figures),
            printable(str(row.get("reason") or "")),
        ]
        for row in rows
    ]  # fmt: skip
    return wandb.Table(columns=["loss", "group", "pairs", "sample_ideal", *CASES, *figures, "reason"], data=data)


def _pair_table(wandb: Any, records: AuditRecords) -> Any:
    last = records.last
    if last is None:
        return None
    data = []
    for place in ranked_pairs(last, _PAIRS)[0]:
        row = records.sample.get(last.pairs[place], {})
        texts = [printable(str(row.get(side, "")))[:_LONGEST] for side in ("prompt", "chosen", "rejected")]
        data.append([last.pairs[place], float(last.columns["cosine"][place]), last.case_of(place), *texts])
    return wandb.Table(columns=["row", "cosine", "case", "prompt", "chosen", "rejected"], data=data)


def _config(records: AuditRecords) -> dict[str, Any]:
    summary = records.summary
    parts = {name: summary[name] for name in ("loss", "reference", "settings", "run")}
    data = {name: value for name, value in summary["data"].items() if name != "skipped"}
    model = {name: value for name, value in summary["model"].items() if name != "coverage"}
    return {**parts, "data": data, "model": model, "gradent": summary["gradent_version"]}
