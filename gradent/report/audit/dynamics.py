"""The section that holds the first-order theory against what training did, checkpoint to checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradent.report.audit.records import AuditRecords
from gradent.report.audit.steps import STEP
from gradent.report.page.cases import CASES, share_of
from gradent.report.page.charts import Chart, Line
from gradent.report.page.html import Section, Table
from gradent.report.page.numbers import count, number, percent, signed_number

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
    """Predicted against realised changes of the log-probs."""
    dynamics = records.summary["dynamics"]
    if dynamics is None:
        return None
    intervals, whole = dynamics.get("intervals") or [], dynamics.get("whole")
    parts: list[Chart | Table] = []
    if len(intervals) > 1:
        parts.append(_chart(intervals))
    if len(intervals) > _SHOWN and whole:
        parts.append(_table([whole], of_run=True))
        parts.append(
            _table(intervals, of_run=False, folded=f"{len(intervals)} intervals, from checkpoint to checkpoint")
        )
    elif intervals or whole:
        parts.append(_table([*intervals, *([whole] if whole else [])], of_run=bool(whole)))
    realised = dynamics.get("cases_realised")
    if realised:
        parts.append(_cases(records, realised))
    if not parts:
        return None
    return Section(
        "Predicted against realised",
        _EXPLAINED,
        parts,
        "Decides: how far the other sections, which are first-order, can be trusted in this run.",
    )


def _chart(intervals: list[Mapping[str, Any]]) -> Chart:
    steps = [float(each["to"]) for each in intervals]
    lines = []
    for side in ("chosen", "rejected"):
        for kind, name in (("change", "realised"), ("predicted", "predicted")):
            values = [_nan(each.get(f"{side}_{kind}")) for each in intervals]
            lines.append(Line(f"{side}, {name}", steps, values, colour=side, dashed=kind == "predicted"))
    title = "Change of the mean log-prob since the checkpoint before"
    return Chart(STEP, "change of mean log π, nats", lines, zero=True, title=title)


def _table(intervals: list[Mapping[str, Any]], *, of_run: bool, folded: str = "") -> Table:
    rows = []
    for place, each in enumerate(intervals):
        whole = of_run and place == len(intervals) - 1
        span = f"{count(each.get('from'))} to {count(each.get('to'))}"
        rows.append([
            f"whole run, {span}" if whole else span,
            *(signed_number(each.get(f"{side}_{kind}")) for side in ("chosen", "rejected")
              for kind in ("change", "predicted")),
            number(each.get("step_size")),
            percent(each.get("explained")),
            *(percent(each.get(f"{side}_sign")) for side in ("chosen", "rejected")),
            count(each.get("pairs")),
        ])  # fmt: skip
    header = [
        "Steps", "Chosen", "Predicted", "Rejected", "Predicted", "Step size", "Explained", "Sign, chosen",
        "Sign, rejected", "Pairs",
    ]  # fmt: skip
    return Table(header, rows, folded, "Changes of the mean log-probs in nats, interval by interval", figures_from=1)


def _cases(records: AuditRecords, realised: Mapping[str, Any]) -> Table:
    last = records.last
    rows = [
        [label, percent(share_of(realised, case)), percent(None if last is None else last.share(case))]
        for case, label in CASES.items()
    ]
    caption = "What became of the pairs over the run, beside what a small step on each alone would do to it now"
    return Table(["Case", "Realised over the run", "Predicted, last checkpoint"], rows, caption=caption, figures_from=1)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
