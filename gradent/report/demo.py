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
from gradent.report.page.numbers import describe_evidence, signed_number
from gradent.report.page.parts import Cell, Table

__all__ = ["write_demo_report"]

_IDEAL = 1  # the number of that case


def write_demo_report(directory: str | os.PathLike[str]) -> Path:
    """Write `report.html` beside a demo's records."""
    place = Path(directory)
    columns = read_pairs(place / "pairs.parquet").to_pydict()
    return write_page(place / "report.html", _to_page(columns, read_demo(place / "demo.json")))


def _to_page(columns: Mapping[str, Sequence[Any]], record: DemoRecord) -> Page:
    model, settings = record["model"], record["settings"]
    count = sum(bool(finding["appears"]) for finding in record["findings"])
    labels = " / ".join(map(str, model["label_words"]))
    texts = [[row["style"], row["prompt"], row["chosen"].strip(), row["rejected"].strip()] for row in record["styles"]]
    styles = Table(("Style", "Prompt", "Chosen", "Rejected"), texts)
    return Page(
        title=f"{count} of the paper's {len(record['findings'])} findings appear in this run",
        lead=(
            "The sentiment experiment in miniature: the same statements are judged in four styles of response. A small "
            "model is fine-tuned, then trained by DPO once a style, and held-out pairs are measured "
            f"every {settings['measure_every']} steps."
        ),
        facts=_facts(record),
        sections=[
            Section("The four styles", f"Of one held-out statement. Labels: {labels}.", [styles]),
            Section(
                "Findings",
                "A finding appears if every mean over the pairs has the sign that it names by more than two standard "
                "errors (±, over the pairs). Changes of log-probs are in nats.",
                [_finding_table(record["findings"])],
            ),
            *(
                Section(
                    f"Log-prob of the {side} response",
                    "Change since step 0, mean over the pairs; the band is one standard error.",
                    [_chart(columns, f"{side}_logp", f"change of log π({side}), nats", is_change=True)],
                )
                for side in ("chosen", "rejected")
            ),
            Section(
                "Cosine of the two gradients",
                "Of ∇ log π(chosen) and ∇ log π(rejected) over all parameters, mean over the pairs; the band is one "
                "standard error. Where it is positive, pushing rejected down pulls chosen down as well.",
                [_chart(columns, "cosine", "gradient cosine")],
            ),
            Section(
                "What a small gradient step on a pair would do to that pair",
                "To first order and alone, share of all measurements of a style: ideal is chosen up and rejected "
                "down; reversed is chosen down and rejected up; inactive is no gradient from the loss. Training takes "
                "steps on batches, where other pairs with the same suffix move this pair too." + _contrast(columns),
                [_case_table(columns)],
            ),
        ],
        foot=f"gradent {record['gradent_version']}, schema version {record['schema_version']}. The numbers behind this "
        "page are in pairs.parquet and demo.json beside it.",
    )


def _facts(record: DemoRecord) -> list[tuple[str, str]]:
    model, settings = record["model"], record["settings"]
    source = model["source"] or "built on the spot"
    sft_rate = f"rate {settings['sft_lr']:g}"
    rate = f"rate {settings['dpo_lr']:g}, β {settings['beta']:g}"
    return [
        ("Model", f"{source}: {model['architecture']}, {model['parameters']:,} parameters"),
        ("SFT", f"{settings['sft_steps']} steps of {settings['sft_batch']} answers, AdamW, {sft_rate}"),
        ("DPO", f"{settings['dpo_steps']} steps of {settings['dpo_batch']} pairs, {settings['dpo_optimizer']}, {rate}"),
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


def _chart(columns: Mapping[str, Sequence[Any]], name: str, label: str, *, is_change: bool = False) -> Chart:
    curves = {style: curve.since_start if is_change else curve for style, curve in read_curves(columns, name).items()}
    lines = [
        Line(style, curve.steps.tolist(), curve.mean.tolist(), curve.error.tolist()) for style, curve in curves.items()
    ]
    return Chart("DPO step", label, lines, zero=True)


def _contrast(columns: Mapping[str, Sequence[Any]]) -> str:
    """The styles whose pairs are ideal alone, and whose chosen fell all the same."""
    cases, logps = read_curves(columns, "case"), read_curves(columns, "chosen_logp")
    found = []
    for style, curve in logps.items():
        ideal, change = float((cases[style].values == _IDEAL).mean()), float(curve.since_start.mean[-1])
        if ideal >= 0.5 and change < 0:
            found.append(f"{style} ({ideal:.0%} ideal, chosen {signed_number(change)} nats)")
    return f" That is why chosen can fall where most pairs are ideal: {', '.join(found)}." if found else ""


def _case_table(columns: Mapping[str, Sequence[Any]]) -> Table:
    rows = []
    for style, curve in read_curves(columns, "case").items():
        shares = [float((curve.values == case).mean()) for case in CASE_NAMES]
        rows.append([style, *(f"{share:.0%}" for share in shares)])
    return Table(["Style", *(name.replace("_", " ") for name in CASE_NAMES.values())], rows)
