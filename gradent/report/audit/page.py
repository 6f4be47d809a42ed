"""The page of `gradent audit`, from the records in its directory alone: what to do first, then why."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gradent.figures.charts import fill_gap
from gradent.report.audit.sections.dynamics import dynamics_section
from gradent.report.audit.sections.layers import layer_section
from gradent.report.audit.sections.losses import loss_section
from gradent.report.audit.sections.moved import run_section, sample_section
from gradent.report.audit.sections.pairs import pair_section, property_section
from gradent.report.audit.sections.records import AuditRecords, Measured, read_audit
from gradent.report.audit.sections.settings import describe_loss, describe_reference, settings_section
from gradent.report.audit.sections.steps import case_section, cosine_section, logp_section
from gradent.report.audit.sections.tokens import token_section
from gradent.report.page.cases import share_of
from gradent.report.page.html import Page, Section, write_page
from gradent.report.page.numbers import count, fixed, percent, plural, step_name
from gradent.report.page.parts import BigNumber, Notice, Numbers

__all__ = ["write_audit_page", "write_audit_report"]


def write_audit_report(directory: str | os.PathLike[str]) -> Path:
    """Write `report.html` beside an audit's records."""
    return write_audit_page(read_audit(directory))


def write_audit_page(records: AuditRecords) -> Path:
    """The same, of records that are read already."""
    return write_page(records.directory / "report.html", _to_page(records))


def _to_page(records: AuditRecords) -> Page:
    summary = records.summary
    sections = [
        _first_section(records), logp_section(records), run_section(records), sample_section(records),
        case_section(records), cosine_section(records), dynamics_section(records), loss_section(records),
        pair_section(records), property_section(records), layer_section(records), token_section(records),
        settings_section(records),
    ]  # fmt: skip
    return Page(
        title=f"Audit of {records.name}",
        lead=_lead(records),
        facts=_facts(records),
        sections=[section for section in sections if section is not None],
        foot=f"gradent {summary['gradent_version']}, schema version {summary['schema_version']}. The numbers behind "
        "this page are in the records beside it.",
        notices=_notices(records),
    )


def _lead(records: AuditRecords) -> str:
    pairs = plural(len(records.last.pairs), "pair") if records.last else "no pair"
    if len(records.measured) > 1:
        return f"The same {pairs} of the data, measured at {len(records.measured)} checkpoints of the run."
    return f"{pairs} of the data, measured on one model.".capitalize()


def _facts(records: AuditRecords) -> list[tuple[str, str]]:
    summary = records.summary
    model, run = summary["model"], summary["run"]
    parameters = f"{count(model.get('trainable_parameters'))} parameters measured, {model.get('dtype')}"
    facts = [
        ("Model", f"{model.get('checkpoint')}: {parameters}"),
        ("Data", str(summary["data"].get("source"))),
        ("Loss", describe_loss(summary["loss"])),
        ("Reference", describe_reference(summary["reference"])),
    ]
    if run is not None:
        kind = {"full": "full fine-tuning", "adapter": "adapter"}.get(str(run.get("kind")), str(run.get("kind")))
        facts.append(("Run", f"{kind}, started from {run.get('base') or 'a model that its files do not name'}"))
    return facts


def _notices(records: AuditRecords) -> list[Notice]:
    summary, notices = records.summary, list[Notice]()
    if summary["doubt"]:
        notices.append(Notice("Another function was trained than is measured here.", str(summary["doubt"]), warns=True))
    if not summary["complete"]:
        asked = (summary["run"] or {}).get("asked")
        of = f" of {len(asked)} checkpoints" if asked else " checkpoint(s)"
        text = (
            f"It was stopped before everything was measured: pairs of {len(records.measured)}{of} are here, and at "
            "some of them perhaps not all pairs. The same command goes on where it stopped."
        )
        notices.append(Notice("This audit is not complete.", text, warns=True))
    if summary["left_out"]:
        rows = summary["left_out"]
        reasons = [f"{row.get('checkpoint')} ({step_name(row.get('step'))}): {row.get('reason')}" for row in rows]
        title = f"{plural(len(rows), 'checkpoint')} could not be measured"
        notices.append(Notice(title, "\n".join(reasons), warns=True))
    return notices


def _first_section(records: AuditRecords) -> Section:
    recommendation = records.summary["recommendation"] or {}
    text = recommendation.get("text") or "There is no recommendation: nothing was measured that one could rest on."
    first, last = records.first, records.last
    parts: list[Notice | Numbers] = [Notice("", str(text))]
    if first is not None and last is not None:
        parts.append(Numbers(_big_numbers(records, first, last)))
    serves = (
        "Decides: whether to change the loss, its hyperparameters, or the data. The text speaks of the last measured "
        "checkpoint, to first order."
    )
    return Section("What to do", "", parts, serves)


def _sample_shares(records: AuditRecords) -> dict[str, tuple[float, float, Callable[[float | None], str]]]:
    """The share of case 1 in a step on the whole sample, first and last; empty where it was not measured."""
    rows = (records.summary["steps"] or {}).get("sample") or []
    if not rows:
        return {}
    shares = [fill_gap(share_of(row.get("cases"), "ideal")) for row in (rows[0], rows[-1])]
    return {"A step on the sample, case 1: chosen rises, rejected falls": (shares[0], shares[1], percent)}


def _big_numbers(records: AuditRecords, first: Measured, last: Measured) -> list[BigNumber]:
    start = "" if first is last else f"at {step_name(first.step)}; now {step_name(last.step)}"
    figures = {
        **_sample_shares(records),
        "Each pair alone, case 1: chosen rises, rejected falls": (first.share("ideal"), last.share("ideal"), percent),
        "Each pair alone, case 2: both fall": (first.share("both_down"), last.share("both_down"), percent),
        "Median cosine": (first.quantile("cosine", 0.5), last.quantile("cosine", 0.5), fixed),
    }
    of = f"of {plural(len(last.pairs), 'pair')}"
    return [
        BigNumber(name, shown(now), f"{shown(before)} {start}" if start else of)
        for name, (before, now, shown) in figures.items()
    ]
