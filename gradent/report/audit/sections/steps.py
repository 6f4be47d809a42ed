"""Sections of an audit's page that follow a run over its steps: log-probs, cases, cosines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from gradent.figures.charts import Bars, Chart, Line, Series, fill_gap
from gradent.report.audit.sections.records import AuditRecords, Measured
from gradent.report.page.cases import CASES, CASES_EXPLAINED, case_series
from gradent.report.page.html import Section
from gradent.report.page.numbers import change, fixed, number, percent, plural, step_name
from gradent.report.page.parts import Table

__all__ = ["STEP", "case_chart", "case_section", "cosine_section", "logp_chart", "logp_section", "thin_out"]

STEP = "training step"
_POINTS = 400  # of a logged curve
_BINS = 24


def logp_section(records: AuditRecords) -> Section:
    """Log-probs over steps, with the onset of the fall; a table alone where there is no curve."""
    title, serves = "Log-probs of chosen and rejected", "Tells you whether training drags chosen down, and since when."
    chart = logp_chart(records)
    if chart is None:
        if records.summary["run"] is None:
            serves = "Tells you how probable the responses are to the model."
        return Section(title, _start(records), [_logp_table(records)] if records.measured else [], serves)
    sentences = [_describe_onset(records), _start(records)]
    if any(line.dashed for line in chart.lines):
        sentences.append(
            "Solid: measured on the same pairs at each checkpoint, the mean with one standard error over the pairs. "
            "Dotted: what the trainer logged, over the batches it trained on, which are other pairs each time; levels "
            "may differ, trends should not."
        )
    else:
        sentences.append("The same pairs at each checkpoint; the band is one standard error over the pairs.")
    return Section(title, " ".join(filter(None, sentences)), [chart, _logp_table(records)], serves)


def logp_chart(records: AuditRecords) -> Chart | None:
    """Both log-probs over steps, measured and logged; None where no line goes from one step to another."""
    lines = [_measured_line(records, side) for side in ("chosen", "rejected")]
    for side in ("chosen", "rejected"):
        points = [point for point in records.logged.get(f"logps/{side}") or [] if point[0] is not None]
        if points:
            lines.append(Line(f"{side}, trainer's log", *thin_out(points), colour=side, dashed=True))
    onset, names = records.of_dynamics("onset"), {"measured": "both fall (measured)", "logged": "both fall (log)"}
    marks = [(float(onset[key]), name) for key, name in names.items() if onset.get(key) is not None]
    chart = Chart(STEP, "mean log π(response), nats", lines, marks=marks)
    return chart if chart.is_curve else None


def _measured_line(records: AuditRecords, side: str) -> Line:
    """The measured log-prob, from the reference's at step 0 where that is the run's start."""
    line = replace(records.mean_line(f"{side}_logp", f"{side}, measured"), colour=side)
    start, first = records.of_dynamics("start").get(f"{side}_logp"), records.first
    if start is None or first is None or first.step <= 0:
        return line
    band = [first.error(f"ref_{side}_logp"), *line.band]
    return replace(line, x=[0.0, *line.x], y=[float(start), *line.y], band=band)


def thin_out(points: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float]]:
    """A logged curve of at most 400 points: where there are more, means of so many neighbours."""
    table = np.array([[fill_gap(number) for number in point] for point in points], dtype=np.float64)
    x, y = [], []
    for part in np.array_split(table, min(_POINTS, len(table))):
        values = part[np.isfinite(part[:, 1]), 1]
        x.append(float(part[:, 0].mean()))
        y.append(float(values.mean()) if values.size else math.nan)
    return x, y


def _describe_onset(records: AuditRecords) -> str:
    if records.summary["dynamics"] is None:
        return ""
    onset, curves = records.of_dynamics("onset"), records.logged
    measured, logged, keys = onset.get("measured"), onset.get("logged"), onset.get("logged_keys") or []
    text = ""
    if len(records.measured) > 1:
        text = f"On the measured pairs, both log-probs fall since {step_name(measured)}."
        if measured is None:
            text = "On the measured pairs, the two log-probs do not both lie clearly below their best checkpoint."
    if logged is not None:
        return f"{text} In the trainer's log ({' and '.join(map(str, keys))}), they fall since {step_name(logged)}."
    if records.summary["history"] is None:
        return text
    if keys:
        return f"{text} In the trainer's log ({' and '.join(map(str, keys))}), they do not clearly fall together."
    holds = any(key.endswith("logps/chosen") for key in curves)
    why = "too few points of them to tell" if holds else "no log-probs of chosen and rejected"
    return f"{text} The trainer's log holds {why}."


def _start(records: AuditRecords) -> str:
    start = records.of_dynamics("start")
    chosen, rejected = start.get("chosen_logp"), start.get("rejected_logp")
    if chosen is None or rejected is None:
        return ""
    return (
        f"At step 0 they were {number(chosen)} (chosen) and {number(rejected)} (rejected) nats, by the reference, "
        "which is the model that the run started from."
    )


def _logp_table(records: AuditRecords) -> Table:
    measured = records.measured
    is_own_reference = records.summary["reference"].get("kind") == "self"
    names = ["chosen_logp", "rejected_logp", *([] if is_own_reference else ["ref_chosen_logp", "ref_rejected_logp"])]
    rows = []
    for checkpoint in measured:
        logps = [change(0.0, checkpoint.mean(name), checkpoint.error(name)) for name in names[:2]]
        logps += [number(checkpoint.mean(name)) for name in names[2:]]
        rows.append([f"{checkpoint.step:,}", checkpoint.name, *logps, f"{len(checkpoint.pairs):,}"])
    references = [] if is_own_reference else ["Reference, chosen", "Reference, rejected"]
    header = ["Step", "Checkpoint", "Chosen", "Rejected", *references, "Pairs"]
    folded = "Log-probs at every checkpoint" if len(measured) > 1 else ""
    return Table(header, rows, folded, "Mean log-probs of whole responses in nats, ± one standard error", 2)


def case_section(records: AuditRecords) -> Section:
    """Cases of the pairs over steps."""
    loss, figure = str(records.summary["loss"].get("name", "the loss")), case_chart(records)
    text = f"What one small gradient step of {loss} on a pair, alone, would do to that pair, to first order. "
    serves = "Tells you whether the loss still does to most pairs what it is meant to do."
    return Section("Cases", text + CASES_EXPLAINED, [] if figure is None else [figure], serves)


def case_chart(records: AuditRecords) -> Chart | Bars | None:
    """Shares of the cases: stacked over steps, or a bar where one checkpoint was measured."""
    measured, label = records.measured, "share of pairs"
    shares = {case: [checkpoint.share(case) for checkpoint in measured] for case in CASES}
    if len(measured) > 1:
        lines = [Line(CASES[case], records.steps, shares[case], colour=case) for case in CASES]
        return Chart(STEP, label, lines, percent=True, stacked=True)
    names = [checkpoint.name for checkpoint in measured]
    return Bars("checkpoint", label, names, case_series(shares), percent=True) if names else None


def cosine_section(records: AuditRecords) -> Section:
    """Cosines over steps as median and quartiles, and their distribution at the last checkpoint."""
    parts: list[Chart | Bars | Table] = []
    if len(records.measured) > 1:
        line = records.quartile_line("cosine", "median, band: quartiles")
        parts.append(Chart(STEP, "cosine of the two gradients", [line], zero=True, title="Over the run"))
    last = records.last
    if last is not None:
        where = f"At the last checkpoint, {step_name(last.step)}" if len(records.measured) > 1 else "Over the pairs"
        parts += [_histogram(last, where), _cosine_table(records.measured)]
    undefined = records.summary["cosine"].get("undefined")
    without = f" {plural(undefined, 'pair')} without one: a gradient is exactly zero." if undefined else ""
    return Section(
        "Cosine of the two gradients",
        "Of ∇ log π(chosen) and ∇ log π(rejected), over all measured parameters. Near 1 the two responses move "
        f"together, whatever the loss asks for; at 0 they move apart freely.{without}",
        parts,
        "Tells you whether the data, rather than the loss, ties the responses together.",
    )


def _histogram(measured: Measured, title: str) -> Bars:
    cosines = measured.finite("cosine")
    low = math.floor(10 * float(cosines.min(initial=0.0))) / 10
    high = math.ceil(10 * float(cosines.max(initial=0.1))) / 10
    counts, edges = np.histogram(cosines, bins=_BINS, range=(low, high))
    names = [f"{a:.2f} to {b:.2f}" for a, b in pairwise(edges)]
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    series = [Series("pairs", counts.astype(np.float64).tolist(), "c0")]
    return Bars("cosine", "pairs", names, series, title=title, upright=True, places=middles)


def _cosine_table(measured: Sequence[Measured]) -> Table:
    shares = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
    rows = []
    for checkpoint in measured:
        quantiles = [checkpoint.quantile("cosine", share) for share in shares.values()]
        cosines = checkpoint.finite("cosine")
        positive = float((cosines > 0).mean()) if cosines.size else math.nan
        mean = fixed(checkpoint.mean("cosine"))
        rows.append([f"{checkpoint.step:,}", *map(fixed, quantiles), mean, percent(positive)])
    folded = "Cosines at every checkpoint" if len(measured) > 1 else ""
    header = ["Step", *shares, "Mean", "Positive"]
    return Table(header, rows, folded, "Distribution of the cosine over the pairs", figures_from=1)
