"""Sections of an audit's page that follow a run over its steps: log-probs, cases, cosines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from gradent.report.audit.records import AuditRecords, Measured
from gradent.report.page.cases import CASES, CASES_EXPLAINED, case_series
from gradent.report.page.charts import Bars, Chart, Line, Series
from gradent.report.page.html import Section, Table
from gradent.report.page.numbers import change, fixed, number, percent, plural, step_name

__all__ = [
    "STEP",
    "case_section",
    "cosine_section",
    "describe_onset",
    "has_curve",
    "logp_lines",
    "logp_section",
    "thin_out",
]

STEP = "training step"
_POINTS = 400  # of a logged curve
_BINS = 24


def logp_section(records: AuditRecords) -> Section:
    """Log-probs over steps, measured and logged, with the onset of the fall."""
    title, serves = "Log-probs of chosen and rejected", "Decides: whether training drags chosen down, and since when."
    lines, marks = logp_lines(records), _marks(records)
    if not has_curve(lines):
        return Section(title, _start(records), [_logp_table(records.measured)] if records.measured else [], serves)
    said = [describe_onset(records), _start(records)]
    if any(line.dashed for line in lines):
        said.append(
            "Solid: measured on the same pairs at each checkpoint, the mean with one standard error over the pairs. "
            "Dotted: what the trainer logged, over the batches it trained on, which are other pairs each time; levels "
            "may differ, trends should not."
        )
    else:
        said.append("The same pairs at each checkpoint; the band is one standard error over the pairs.")
    chart = Chart(STEP, "mean log π(response), nats", lines, marks=marks)
    return Section(title, " ".join(filter(None, said)), [chart, _logp_table(records.measured)], serves)


def logp_lines(records: AuditRecords, suffix: str = "") -> list[Line]:
    """Curves of the two log-probs, measured, and logged where the trainer's log is there."""
    lines = []
    for side in ("chosen", "rejected"):
        values = [each.mean(f"{side}_logp") for each in records.measured]
        errors = [each.error(f"{side}_logp") for each in records.measured]
        steps, start = records.steps, ((records.summary["dynamics"] or {}).get("start") or {}).get(f"{side}_logp")
        if start is not None and records.first is not None and records.first.step > 0:
            steps, values = [0.0, *steps], [float(start), *values]
            errors = [records.first.error(f"ref_{side}_logp"), *errors]
        lines.append(Line(f"{side}, measured{suffix}", steps, values, errors, colour=side))
    curves = (records.summary["history"] or {}).get("curves") or {}
    for side in ("chosen", "rejected"):
        points = [point for point in curves.get(f"logps/{side}") or [] if point[0] is not None]
        if points:
            x, y = thin_out(points)
            lines.append(Line(f"{side}, trainer's log{suffix}", x, y, colour=side, dashed=True))
    return lines


def has_curve(lines: Sequence[Line]) -> bool:
    """Whether lines are more than points."""
    return any(len(set(line.x)) > 1 for line in lines)


def thin_out(points: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float]]:
    """A logged curve of at most 400 points: where there are more, means of so many neighbours."""
    table = np.array([[math.nan if each is None else each for each in point] for point in points], dtype=np.float64)
    parts = np.array_split(table, min(_POINTS, len(table)))
    x, y = [], []
    for part in parts:
        there = part[np.isfinite(part[:, 1]), 1]
        x.append(float(part[:, 0].mean()))
        y.append(float(there.mean()) if there.size else math.nan)
    return x, y


def describe_onset(records: AuditRecords) -> str:
    """When both log-probs began to fall."""
    dynamics = records.summary["dynamics"]
    if dynamics is None:
        return ""
    onset = dynamics.get("onset") or {}
    measured, logged = onset.get("measured"), onset.get("logged")
    said = (
        "At none of the measured checkpoints had both log-probs begun to fall."
        if measured is None
        else f"On the measured pairs, both log-probs fall from {step_name(measured)} on."
    )
    if logged is not None:
        keys = " and ".join(map(str, onset.get("logged_keys") or [])) or "the logged log-probs"
        said += f" In the trainer's log ({keys}), they do from {step_name(logged)} on."
    elif records.summary["history"] is not None:
        said += " The trainer's log shows no such fall, or does not hold the log-probs."
    return said


def case_section(records: AuditRecords) -> Section:
    """Cases of the pairs over steps."""
    measured = records.measured
    shares = {case: [each.share(case) for each in measured] for case in CASES}
    loss = str(records.summary["loss"].get("name", "the loss"))
    label = "share of pairs"
    if len(measured) > 1:
        lines = [Line(CASES[case], records.steps, shares[case], colour=case) for case in CASES]
        figure: Chart | Bars = Chart(STEP, label, lines, percent=True, stacked=True)
    else:
        figure = Bars("checkpoint", label, [each.name for each in measured], case_series(shares), percent=True)
    return Section(
        "Cases",
        f"What one small gradient step of {loss} on a pair, alone, would do to that pair, to first order. "
        f"{CASES_EXPLAINED}",
        [figure] if measured else [],
        "Decides: whether the loss still does to most pairs what it is meant to do.",
    )


def cosine_section(records: AuditRecords) -> Section:
    """Cosines over steps as median and quartiles, and their distribution at the last checkpoint."""
    parts: list[Chart | Bars | Table] = []
    if len(records.measured) > 1:
        quartiles = [[each.quantile("cosine", share) for each in records.measured] for share in (0.25, 0.5, 0.75)]
        line = Line("median, band: quartiles", records.steps, quartiles[1], low=quartiles[0], high=quartiles[2])
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
        "Decides: whether the data, rather than the loss, ties the responses together.",
    )


def _histogram(measured: Measured, title: str) -> Bars:
    there = measured.columns["cosine"][np.isfinite(measured.columns["cosine"])]
    low = math.floor(10 * float(there.min(initial=0.0))) / 10
    high = math.ceil(10 * float(there.max(initial=0.1))) / 10
    counts, edges = np.histogram(there, bins=_BINS, range=(low, high))
    names = [f"{a:.2f} to {b:.2f}" for a, b in pairwise(edges)]
    series = [Series("pairs", [float(each) for each in counts], "c0")]
    middles = [float(each) for each in (edges[:-1] + edges[1:]) / 2]
    return Bars("cosine", "pairs", names, series, title=title, upright=True, places=middles)


def _cosine_table(measured: Sequence[Measured]) -> Table:
    shares = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
    rows = [
        [
            f"{each.step:,}",
            *(fixed(each.quantile("cosine", share)) for share in shares.values()),
            fixed(each.mean("cosine")),
            percent(_positive(each)),
        ]
        for each in measured
    ]
    folded = "Cosines at every checkpoint" if len(measured) > 1 else ""
    header = ["Step", *shares, "Mean", "Positive"]
    return Table(header, rows, folded, "Distribution of the cosine over the pairs", figures_from=1)


def _positive(measured: Measured) -> float:
    there = measured.columns["cosine"][np.isfinite(measured.columns["cosine"])]
    return float((there > 0).mean()) if there.size else math.nan


def _logp_table(measured: Sequence[Measured]) -> Table:
    names = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    rows = [
        [
            f"{each.step:,}",
            each.name,
            *(change(0.0, each.mean(name), each.error(name)) for name in names[:2]),
            *(number(each.mean(name)) for name in names[2:]),
            f"{len(each.pairs):,}",
        ]
        for each in measured
    ]
    header = ["Step", "Checkpoint", "Chosen", "Rejected", "Reference, chosen", "Reference, rejected", "Pairs"]
    folded = "Log-probs at every checkpoint" if len(measured) > 1 else ""
    return Table(header, rows, folded, "Mean log-probs of whole responses in nats, ± one standard error", 2)


def _marks(records: AuditRecords) -> list[tuple[float, str]]:
    onset = (records.summary["dynamics"] or {}).get("onset") or {}
    names = {"measured": "both fall (measured)", "logged": "both fall (log)"}
    return [(float(onset[key]), name) for key, name in names.items() if onset.get(key) is not None]


def _start(records: AuditRecords) -> str:
    start = (records.summary["dynamics"] or {}).get("start") or {}
    chosen, rejected = start.get("chosen_logp"), start.get("rejected_logp")
    if chosen is None or rejected is None:
        return ""
    return (
        f"At step 0 they were {number(chosen)} (chosen) and {number(rejected)} (rejected) nats, by the reference, "
        "which is the model that the run started from."
    )
