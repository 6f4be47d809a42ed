"""The page of `gradent demo`, from the `pairs.parquet` and `demo.json` in its directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradent.figures.charts import Chart, Line
from gradent.record import CASE_NAMES, DemoRecord, read_demo, read_pairs
from gradent.record.curves import read_curves
from gradent.report.page.html import Page, Section, write_page
from gradent.report.page.parts import Cell, Table

__all__ = ["describe_evidence", "write_demo_report"]

_STEP = "DPO step"


def write_demo_report(directory: str | os.PathLike[str]) -> Path:
    """Write `report.html` beside a demo's records."""
    place = Path(directory)
    columns = read_pairs(place / "pairs.parquet").to_pydict()
    return write_page(place / "report.html", _to_page(columns, read_demo(place / "demo.json")))


def describe_evidence(evidence: Mapping[str, Any]) -> str:
    """One measured mean as text."""
    mean, error = evidence["mean"], evidence["error"]
    value = "no value" if mean is None else f"{mean:+.3f}"
    return f"{evidence['label']}: {value}" + ("" if error is None else f" ± {error:.3f}")


def _to_page(columns: Mapping[str, Sequence[Any]], record: DemoRecord) -> Page:
    model, settings = record["model"], record["settings"]
    count = sum(bool(finding["appears"]) for finding in record["findings"])
    return Page(
        title="Gradient entanglement: the sentiment experiment in miniature",
        lead=(
            "The same statements are judged in four styles of response. A small model is fine-tuned, then trained by "
            f"DPO once a style, and held-out pairs are measured every {settings['measure_every']} steps. {count} of "
            f"the paper's {len(record['findings'])} findings appear in this run."
        ),
        facts=_facts(record),
        sections=[
            Section(
                "Findings",
                "A finding appears if every mean over the pairs has the sign that it names by more than two standard "
                "errors (±, over the pairs).",
                [_finding_table(record["findings"])],
            ),
            Section(
                "Log-prob of the chosen response",
                "Change since step 0, mean over the pairs; the band is one standard error.",
                [_change_chart(columns, "chosen_logp", "change of log π(chosen), nats")],
            ),
            Section(
                "Log-prob of the rejected response",
                "Change since step 0, mean over the pairs; the band is one standard error.",
                [_change_chart(columns, "rejected_logp", "change of log π(rejected), nats")],
            ),
            Section(
                "Cosine of the two gradients",
                "Of ∇ log π(chosen) and ∇ log π(rejected) over all parameters, mean over the pairs; the band is one "
                "standard error. Where it is positive, pushing rejected down pulls chosen down as well.",
                [_value_chart(columns, "cosine", "gradient cosine")],
            ),
            Section(
                "What a small gradient step on a pair would do to that pair",
                "To first order and alone, share of all measurements of a style: ideal is chosen up and rejected "
                "down; reversed is chosen down and rejected up; inactive is no gradient from the loss. Training takes "
                "steps on batches, where other pairs with the same suffix move this pair too.",
                [_case_table(columns)],
            ),
            Section("The four styles", f"Of one held-out statement. Labels: {_words(model)}.", [_styles_table(record)]),
        ],
        foot=f"gradent {record['gradent_version']}, schema version {record['schema_version']}. The numbers behind this "
        "page are in pairs.parquet and demo.json beside it.",
    )


def _facts(record: DemoRecord) -> list[tuple[str, str]]:
    model, settings = record["model"], record["settings"]
    source = model["source"] or "built on the spot"
    return [
        ("Model", f"{source}: {model['architecture']}, {model['parameters']:,} parameters"),
        (
            "SFT",
            f"{settings['sft_steps']} steps of {settings['sft_batch']} answers, AdamW, rate {settings['sft_lr']:g}",
        ),
        (
            "DPO",
            f"{settings['dpo_steps']} steps of {settings['dpo_batch']} pairs, {settings['dpo_optimizer']}, rate "
            f"{settings['dpo_lr']:g}, β {settings['beta']:g}",
        ),
        ("Measured", f"{settings['probe']} held-out pairs a style"),
        ("Seed", str(settings["seed"])),
        ("Took", f"{record['seconds']:.0f} s"),
    ]


def _finding_table(findings: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            Cell((finding["claim"], finding["rule"])),
            Cell(tuple(describe_evidence(evidence) for evidence in finding["evidence"])),
            Cell(("appears",), "good") if finding["appears"] else Cell(("does not appear",), "bad"),
        )
        for finding in findings
    ]
    return Table(("The paper's finding", "Measured", "In this run"), rows)


def _value_chart(columns: Mapping[str, Sequence[Any]], name: str, label: str) -> Chart:
    lines = [
        Line(style, curve.steps.tolist(), curve.mean.tolist(), curve.error.tolist())
        for style, curve in read_curves(columns, name).items()
    ]
    return Chart(_STEP, label, lines, zero=True)


def _change_chart(columns: Mapping[str, Sequence[Any]], name: str, label: str) -> Chart:
    lines = []
    for style, curve in read_curves(columns, name).items():
        since = curve.since_start
        lines.append(Line(style, since.steps.tolist(), since.mean.tolist(), since.error.tolist()))
    return Chart(_STEP, label, lines, zero=True)


def _case_table(columns: Mapping[str, Sequence[Any]]) -> Table:
    rows = []
    for style, curve in read_curves(columns, "case").items():
        shares = [float((curve.values == case).mean()) for case in CASE_NAMES]
        rows.append([style, *(f"{share:.0%}" for share in shares)])
    return Table(["Style", *(name.replace("_", " ") for name in CASE_NAMES.values())], rows)


def _styles_table(record: DemoRecord) -> Table:
    rows = [[row["style"], row["prompt"], row["chosen"].strip(), row["rejected"].strip()] for row in record["styles"]]
    return Table(("Style", "Prompt", "Chosen", "Rejected"), rows)


def _words(model: Mapping[str, Any]) -> str:
    return " / ".join(map(str, model["label_words"]))
