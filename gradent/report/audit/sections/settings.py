"""The last section of an audit's page: what was measured with what, what was skipped, and what to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradent.report.audit.sections.records import AuditRecords
from gradent.report.page.html import Section
from gradent.report.page.numbers import count, plural
from gradent.report.page.parts import Notice, Table

__all__ = ["describe_loss", "describe_reference", "list_settings", "settings_section"]

_SKIPPED = 100
_REFERENCES = {"none": "none", "self": "the model itself", "adapter_off": "its base without the adapter", "model": ""}


def settings_section(records: AuditRecords) -> Section:
    """Settings, data, skipped rows and notes."""
    summary = records.summary
    rows = [[name, value] for name, value in list_settings(summary).items()]
    parts: list[Table | Notice] = [
        Table(["What", "Which"], [[name, value] for name, value in _facts(records)], caption="What was measured"),
        Table(["Setting", "Value"], rows, "All settings", "As they were applied"),
    ]
    skipped = summary["data"].get("skipped") or []
    if skipped:
        shown = [[count(bad.get("row")), str(bad.get("where")), str(bad.get("reason"))] for bad in skipped[:_SKIPPED]]
        more = f"; {len(skipped) - _SKIPPED:,} more in summary.json" if len(skipped) > _SKIPPED else ""
        folded = f"{plural(len(skipped), 'row')} skipped, with the reasons"
        parts.append(Table(["Row", "Where", "Reason"], shown, folded, f"Rows that could not be used{more}"))
    parts += [Notice("Note", str(note)) for note in summary["notes"]]
    data, cut = summary["data"], summary["data"].get("truncated_responses")
    were = "were measured" if summary["complete"] else "were to be measured"
    text = f"{count(data.get('measured'))} of the data's {count(data.get('rows'))} rows {were}."
    end = "beginning" if summary["settings"].get("truncation_mode") == "keep_end" else "end"
    text += f" {plural(cut, 'row')} lost the {end} to max_length." if cut else ""
    serves = "Tells you whether two audits can be compared, and how to run this one again."
    return Section("Settings and data", text, parts, serves)


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


def describe_loss(loss: Mapping[str, Any]) -> str:
    """A loss and its hyperparameters."""
    hyper = ", ".join(f"{name}={value}" for name, value in loss.items() if name != "name")
    return f"{loss.get('name', 'unnamed')}" + (f" ({hyper})" if hyper else "")


def describe_reference(reference: Mapping[str, Any]) -> str:
    """Where the reference's log-probs come from."""
    kind = str(reference.get("kind"))
    return _REFERENCES.get(kind, kind) or str(reference.get("source") or "the model that the run started from")


def list_settings(summary: Mapping[str, Any]) -> dict[str, str]:
    """Everything that was set, by name: what two audits are compared by."""
    settings = {"loss": describe_loss(summary["loss"]), "reference": describe_reference(summary["reference"])}
    settings |= {f"data: {name}": str(summary["data"].get(name)) for name in ("source", "rows", "measured")}
    settings |= {f"model: {name}": _text(value) for name, value in summary["model"].items() if name != "coverage"}
    if isinstance(summary["model"].get("coverage"), float):
        settings["model: coverage"] = f"{summary['model']['coverage']:.4g}"
    settings |= {f"run: {name}": _text(value) for name, value in (summary["run"] or {}).items()}
    settings |= {name: _text(value) for name, value in summary["settings"].items()}
    return {**settings, "gradent": str(summary["gradent_version"])}


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
