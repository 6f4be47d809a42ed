"""The section that holds the first-order theory against what training did, checkpoint to checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from gradent.figures.charts import Chart, Line, fill_gap
from gradent.report.audit.sections.records import AuditRecords, Row
from gradent.report.audit.sections.steps import STEP
from gradent.report.page.cases import CASES, share_of
from gradent.report.page.html import Section
from gradent.report.page.numbers import count, number, percent, signed_number
from gradent.report.page.parts import Table

__all__ = ["dynamics_section"]

_SHOWN = 8  # intervals; where there are more, only the whole run is not folded
_EXPLAINED = (
    "Predicted: each pair's change by the first-order theory of the loss at the interval's first checkpoint, times "
    "the one step size that fits the interval best. Explained is the share of the squared realised changes that it "
    "accounts for; over the whole run nothing is fitted anew, and below 0 it does worse than predicting no change. "
    "Sign: the share of pairs that moved the way it said. Between checkpoints a run takes many steps on many pairs, "
    "so a large unexplained part is common."
)


def dynamics_section(records: AuditRecords) -> Section | None:
    """Predicted against realised changes of the log-probs; None where a single checkpoint was measured."""
    dynamics: Row = records.summary["dynamics"] or {}
    intervals, run = dynamics.get("intervals") or [], dynamics.get("whole")
    rows = [_row(interval) for interval in intervals]
    last = [_row(run, "whole run, ")] if run else []
    parts: list[Chart | Table] = []
    if len(rows) > 1:
        parts.append(_chart(intervals))
    if len(rows) > _SHOWN and last:
        parts += [_table(last), _table(rows, f"{len(rows)} intervals, from checkpoint to checkpoint")]
    elif rows or last:
        parts.append(_table(rows + last))
    realised = dynamics.get("cases_realised")
    if realised:
        parts.append(_cases(records, realised))
    serves = "Tells you how far the other sections, which are first-order, can be trusted in this run."
    return Section("Predicted against realised", _EXPLAINED, parts, serves) if parts else None


def _chart(intervals: Sequence[Row]) -> Chart:
    steps = [float(interval["to"]) for interval in intervals]
    lines = []
    for side in ("chosen", "rejected"):
        for kind, name in (("change", "realised"), ("predicted", "predicted")):
            values = [fill_gap(interval.get(f"{side}_{kind}")) for interval in intervals]
            lines.append(Line(f"{side}, {name}", steps, values, colour=side, dashed=kind == "predicted"))
    title = "Change of the mean log-prob since the checkpoint before"
    return Chart(STEP, "change of mean log π, nats", lines, zero=True, title=title)


def _table(rows: Sequence[Sequence[str]], folded: str = "") -> Table:
    header = ["Steps", "Chosen", "Predicted", "Rejected", "Predicted", "Step size", "Explained"]
    header += ["Sign, chosen", "Sign, rejected", "Pairs"]
    return Table(header, rows, folded, "Changes of the mean log-probs in nats, interval by interval", figures_from=1)


def _row(interval: Row, name: str = "") -> list[str]:
    changes = [f"{side}_{kind}" for side in ("chosen", "rejected") for kind in ("change", "predicted")]
    return [
        f"{name}{count(interval.get('from'))} to {count(interval.get('to'))}",
        *(signed_number(interval.get(key)) for key in changes),
        number(interval.get("step_size")),
        *(percent(interval.get(key)) for key in ("explained", "chosen_sign", "rejected_sign")),
        count(interval.get("pairs")),
    ]


def _cases(records: AuditRecords, realised: Row) -> Table:
    last = records.last
    predicted = {case: None if last is None else last.share(case) for case in CASES}
    rows = [[CASES[case], percent(share_of(realised, case)), percent(predicted[case])] for case in CASES]
    caption = "What became of the pairs over the run, beside what a small step on each alone would do to it now"
    return Table(["Case", "Realised over the run", "Predicted, last checkpoint"], rows, caption=caption, figures_from=1)
