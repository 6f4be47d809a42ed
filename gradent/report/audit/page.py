"""The page of `gradent audit`, from the records in its directory alone: what to do first, then why."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gradent.report.audit.sections.answer import answer_section, describe_finding
from gradent.report.audit.sections.dynamics import dynamics_section
from gradent.report.audit.sections.layers import layer_section
from gradent.report.audit.sections.losses import loss_section
from gradent.report.audit.sections.moved import run_section, sample_section
from gradent.report.audit.sections.pairs import pair_section, property_section
from gradent.report.audit.sections.records import AuditRecords, read_audit
from gradent.report.audit.sections.settings import describe_loss, settings_section
from gradent.report.audit.sections.steps import case_section, cosine_section, logp_section
from gradent.report.audit.sections.tokens import token_section
from gradent.report.page.html import Page, write_page
from gradent.report.page.numbers import plural, step_name
from gradent.report.page.parts import Notice

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
        answer_section(records), logp_section(records), run_section(records), sample_section(records),
        case_section(records), cosine_section(records), dynamics_section(records), loss_section(records),
        pair_section(records), property_section(records), layer_section(records), token_section(records),
        settings_section(records),
    ]  # fmt: skip
    first, *others = [section for section in sections if section is not None]
    return Page(
        title=describe_finding(records.summary),
        lead=_lead(records),
        sections=[first, *(replace(section, folded=True) for section in others)],
        foot=f"gradent {summary['gradent_version']}, schema version {summary['schema_version']}. The numbers behind "
        "this page are in the records beside it.",
        notices=_notices(records),
    )


def _lead(records: AuditRecords) -> str:
    pairs = plural(len(records.last.pairs), "pair") if records.last else "no pair"
    what = f"Audit of {records.name}: {pairs} of {records.summary['data'].get('source')}"
    if len(records.measured) > 1:
        return f"{what}, the same at {len(records.measured)} checkpoints; {describe_loss(records.summary['loss'])}."
    return f"{what}, on one model; {describe_loss(records.summary['loss'])}."


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
