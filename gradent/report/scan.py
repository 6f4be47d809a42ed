"""The page of `gradent scan`, from the `scan.parquet` and `scan.json` in its directory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradent.figures.charts import Bars, Series, fill_gap
from gradent.record.scans import ScanRecord, read_scan, read_scan_record
from gradent.report.page.html import Page, Section, write_page
from gradent.report.page.numbers import count, fixed, number, plural, signed_number
from gradent.report.page.parts import Notice, Part, Table

__all__ = ["GOALS", "write_scan_report"]

GOALS: dict[str, str] = {
    "cosine": "exact cosine", "pair_change": "chosen in a step on the pair",
    "sample_change": "chosen in a step on the sample",
}  # fmt: skip
"""What the rungs stand in for, in words."""

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SHOWN = (
    "chosen_len", "rejected_len", "edit_distance", "chosen_logp", "rejected_logp", "reward_margin", "ches",
    "ches_normalized", "head_cosine", "head_change", "cosine", "chosen_change", "chosen_sample_change",
)  # fmt: skip


def write_scan_report(directory: str | os.PathLike[str]) -> Path:
    """Write `report.html` beside a scan's records."""
    place = Path(directory)
    table = read_scan(place / "scan.parquet")
    columns = {name: table[name].cast("float64").to_numpy(zero_copy_only=False) for name in _SHOWN}
    return write_page(place / "report.html", _to_page(columns, read_scan_record(place / "scan.json")))


def _to_page(columns: Mapping[str, Any], record: ScanRecord) -> Page:
    model, data = record["model"], record["data"]
    parameters = f"{count(model.get('trainable_parameters'))} trainable parameters, {model.get('dtype')}"
    loss = ", ".join(f"{name} {value}" if name != "name" else str(value) for name, value in record["loss"].items())
    exact = record["exact"]
    return Page(
        title=f"Scan of {data['source']}",
        lead=f"{plural(data['scanned'], 'pair')} with their stand-ins, from one forward a response; "
        f"{plural(exact['pairs'] if exact else 0, 'pair')} of them measured exactly.",
        facts=[
            ("Model", f"{model.get('checkpoint')}: {parameters}"), ("Loss", loss),
            ("Reference", str(record["reference"].get("source") or record["reference"].get("kind"))),
        ],
        sections=[_grade_section(record), _cost_section(record), _value_section(columns)],
        foot=f"gradent {record['gradent_version']}, schema version {record['schema_version']}. The numbers behind this "
        "page are in scan.parquet and scan.json beside it.",
        notices=[Notice("", note) for note in record["notes"]],
    )  # fmt: skip


def _grade_section(record: ScanRecord) -> Section:
    text = (
        "Spearman's rank correlation of each stand-in with what it stands in for, over the exactly measured pairs, "
        "with its 95% interval by bootstrap. All are turned so that more is worse: 1 ranks the pairs as the exact "
        "value does, 0 knows nothing of it, and a negative one points the other way."
    )
    serves = "Decides: which score to choose data by (gradent select --by)."
    if not record["grades"]:
        return Section("How good each stand-in is", "Too few pairs were measured exactly (--exact).", [], serves)
    rows = [
        [row["label"], row["rung"], *(_interval(row[goal]) for goal in GOALS), number(row["cost"])]
        for row in record["grades"]
    ]
    header = ("stand-in", "--by", *GOALS.values(), "seconds a pair")
    parts: list[Part] = [Table(header, rows, figures_from=2)]
    for goal, name in GOALS.items():
        shown = [row for row in record["grades"] if row[goal]["spearman"] is not None]
        values = [fill_gap(row[goal]["spearman"]) for row in shown]
        if shown:
            series = [Series("Spearman's ρ", values, "own")]
            parts.append(
                Bars("stand-in", "Spearman's ρ", [row["label"] for row in shown], series, title=f"With {name}")
            )
    return Section("How good each stand-in is", text, parts, serves)


def _cost_section(record: ScanRecord) -> Section:
    costs, forward = record["costs"], record["costs"].get("forward")
    rows = []
    for name, value in costs.items():
        share = value / forward if value is not None and forward else math.nan
        rows.append([name, number(value), number(share)])
    text = "Seconds a pair (two responses), and as multiples of the two forwards, as this scan took them."
    return Section("What it cost", text, [Table(("part", "seconds a pair", "forwards"), rows, figures_from=1)])


def _value_section(columns: Mapping[str, Any]) -> Section:
    rows = []
    for name, values in columns.items():
        known = values[np.isfinite(values)]
        if len(known):
            marks = np.quantile(known, _QUANTILES)
            rows.append([name, count(len(known)), *(signed_number(float(mark)) for mark in marks)])
    header = ("column", "pairs", *(f"{share:.0%}" for share in _QUANTILES))
    return Section("The scores", "Quantiles over the pairs that have one.", [Table(header, rows, figures_from=1)])


def _interval(grade: Mapping[str, float | None]) -> str:
    if grade["spearman"] is None:
        return "-"
    return f"{fixed(grade['spearman'])} ({fixed(grade['low'])} to {fixed(grade['high'])})"
