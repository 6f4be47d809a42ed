"""What a demo prints: how far each style moved, and which of the paper's findings showed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from gradent.record import DemoRecord
from gradent.record.curves import mean_and_error, read_curves
from gradent.report.page.numbers import describe_evidence
from gradent.report.terminal.tables import new_table

__all__ = ["print_findings"]


def print_findings(columns: Mapping[str, Sequence[Any]], record: DemoRecord, console: Console) -> None:
    """Print both tables of a demo."""
    model, settings = record["model"], record["settings"]
    name = model["source"] or "the embedded model"
    title = (
        f"\nDPO on {name} ({model['architecture']}, {model['parameters']:,} parameters), {settings['dpo_steps']} "
        f"steps, seed {settings['seed']}; means over {settings['probe']} held-out pairs\n"
    )
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(_style_table(columns))
    console.print(Text("\nThe paper's findings, as measured in this run (± one standard error over the pairs)\n"))
    console.print(_finding_table(record["findings"]))
    count = sum(bool(finding["appears"]) for finding in record["findings"])
    foot = (
        f"\n{count} of {len(record['findings'])} findings appear: every mean has the finding's sign by more than "
        f"two standard errors. Took {record['seconds']:.0f} s."
    )
    console.print(Text(foot), soft_wrap=True)


def _style_table(columns: Mapping[str, Sequence[Any]]) -> Table:
    curves = {name: read_curves(columns, name) for name in ("chosen_logp", "rejected_logp", "cosine")}
    rows = [
        [
            style,
            *(f"{curve[style].mean[0]:+.2f} → {curve[style].mean[-1]:+.2f}" for curve in curves.values()),
            f"{mean_and_error(cosine.over_steps)[0]:+.2f}",
        ]
        for style, cosine in curves["cosine"].items()
    ]
    names = [f"{name}\nfirst → last" for name in ("log π(chosen)", "log π(rejected)", "cosine")]
    return new_table(Column("style", no_wrap=True), *names, "cosine\nmean", rows=rows)


def _finding_table(findings: Sequence[Mapping[str, Any]]) -> Table:
    columns = Column("finding", ratio=3), Column("measured", ratio=3), Column("in this run", no_wrap=True)
    rows: list[list[str | Text]] = [
        [
            Text(f"{finding['claim']}\n", end="") + Text(finding["rule"], "dim"),
            "\n".join(describe_evidence(evidence) for evidence in finding["evidence"]),
            Text("appears", "green") if finding["appears"] else Text("does not appear", "bold red"),
        ]
        for finding in findings
    ]
    return new_table(*columns, rows=rows)
