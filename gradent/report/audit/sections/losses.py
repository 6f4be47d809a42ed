"""The section on other losses: what each would do with the gradients that the run has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradent.figures.charts import Bars, Chart, Line, fill_gap
from gradent.report.audit.sections.records import AuditRecords, Row
from gradent.report.audit.sections.steps import STEP
from gradent.report.page.cases import CASES, case_series, share_of
from gradent.report.page.html import Section
from gradent.report.page.numbers import number, percent, plural
from gradent.report.page.parts import Cell, Table

__all__ = ["describe_row", "loss_bars", "loss_section", "loss_table", "shown_rows"]

_SHOWN = ("run", "term", "paper", "design")
_LINES = 4  # as many as the page has colours for
_TEXT = (
    "The same measured gradients, judged under each loss by Condition 2: the loss adds only its weights d_w and d_l. "
    "It speaks of one small step on a pair alone, from {}. Chosen rises where d_w/d_l is at least the first bound, "
    "rejected falls where it is at most the second (medians over pairs with a positive inner product). Token masking "
    "is another step, on the differing tokens alone, and of the pairs whose tokens were measured."
)

_ABOUT = {
    "pairwise_normalized": ("by construction (Section 5.1 of the paper)",),
    "token_masked": ("whose tokens were measured (Section 5.2 of the paper)",),
    "reward_calibration": ("both weights rebalanced, alike for all pairs (Wu et al. 2026)",),
}
"""What a design is, in a line beside its name."""
_OF_THE_RUN = ", this run's"  # behind the name of the loss that the run was trained with
_OF_A_RUN = (
    "the weights that this run arrived at; a run that had trained with another loss would have arrived elsewhere"
)
_SAMPLE = (
    " Sample, case 1: the same share for one step on the mean loss of the whole sample, which the recommendation goes "
    "by."
)
_SKETCHED = (
    " What the other pairs do in that step is estimated from sketches of the gradients, which had no room in "
    "memory_budget: inner products are off by {} of ‖g_w‖‖g_l‖ (root mean square over the pairs, whose products are "
    "known)."
)


def loss_section(records: AuditRecords) -> Section | None:
    """Other losses on the run's gradients; None where the record has no such rows."""
    rows = records.summary["what_if"]
    if not rows:
        return None
    shown, sweeps, bars = _distinct(rows), [row for row in rows if row.get("group") == "sweep"], loss_bars(records)
    parts: list[Bars | Chart | Table] = [] if bars is None else [bars]
    vectors = (records.summary["steps"] or {}).get("what_if") or {}
    text = _TEXT.format("these weights" if records.summary["run"] is None else _OF_A_RUN) + (_SAMPLE if vectors else "")
    text += _SKETCHED.format(percent(vectors.get("error"))) if vectors and not vectors.get("is_exact") else ""
    of = "the last checkpoint" if records.summary["run"] is not None else "the model"
    parts.append(loss_table(shown, f"Losses on the gradients of {of}", own=_whose(records)))
    lines = _over_steps(shown, records.summary["recommendation"] or {})
    if lines:
        title = "Case 1 over the run, by loss"
        parts.append(Chart(STEP, "share of pairs in case 1", lines, percent=True, title=title))
    if sweeps:
        folded = f"{len(sweeps)} more settings: hyperparameters varied one at a time"
        parts.append(loss_table(sweeps, "Hyperparameters varied", folded))
    return Section("What if: other losses", text, parts, "Tells you whether another loss, or another β, would help.")


def shown_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that are not sweeps: the run's loss, the paper's, the designs."""
    return [row for group in _SHOWN for row in rows if row.get("group") == group]


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Those rows, the paper's losses without the run's own, which is there already."""
    own = {row.get("label") for row in rows if row.get("group") == "run"}
    return [row for row in shown_rows(rows) if row.get("group") != "paper" or row.get("label") not in own]


def _whose(records: AuditRecords) -> str:
    return _OF_THE_RUN if records.summary["run"] is not None else ", the loss asked about"


def loss_bars(records: AuditRecords) -> Bars | None:
    """Stacked shares of the cases, a bar each loss that could be judged; None where none could."""
    rows = [row for row in _distinct(records.summary["what_if"]) if row.get("cases")]
    shares = {case: [fill_gap(share_of(row["cases"], case)) for row in rows] for case in CASES}
    names = [describe_row(row, _whose(records)) for row in rows]
    return (
        Bars("loss", "share of pairs, a step on each alone", names, case_series(shares), percent=True) if rows else None
    )


def loss_table(rows: Sequence[Row], caption: str, folded: str = "", own: str = _OF_THE_RUN) -> Table:
    """A row a loss, with shares, ratio and bounds; a loss without numbers says why."""
    has_sample = any(row.get("sample") for row in rows)
    header = [
        "Loss",
        *(["Sample, case 1"] if has_sample else []),
        *(label.partition(":")[0].capitalize() for label in CASES.values()),
    ]
    header += ["Median d_w/d_l", "Chosen rises from", "Rejected falls to", "Within both"]
    return Table(header, [_row(row, own, has_sample=has_sample) for row in rows], folded, caption, figures_from=1)


def describe_row(row: Row, own: str = _OF_THE_RUN) -> str:
    """A loss's name; the audit's own is marked as such."""
    name = str(row.get("label") or row.get("loss") or "a loss")
    if row.get("loss") == "token_masked" and row.get("cases"):
        return f"{name}, {plural(int(row.get('pairs') or 0), 'pair')}"
    return name + (own if row.get("group") == "run" else "")


def _row(row: Row, own: str, *, has_sample: bool) -> list[Cell | str]:
    lines = [describe_row(row, own)]
    if row.get("group") == "design" and row.get("cases"):
        lines += _ABOUT.get(str(row.get("loss")), ())
    if row.get("reason"):
        lines.append(str(row["reason"]))
    shares = [percent(share_of(row.get("cases"), case)) for case in CASES]
    figures = [number(row.get(name)) for name in ("ratio", "needs_at_least", "needs_at_most")]
    sample = [percent(share_of((row.get("sample") or {}).get("cases"), "ideal"))] if has_sample else []
    return [Cell(tuple(lines)), *sample, *shares, *figures, percent(row.get("within"))]


def _over_steps(rows: Sequence[Row], recommended: Mapping[str, object]) -> list[Line]:
    """The run's loss, the best other one and the designs, where there are several steps."""
    best = recommended.get("best")
    # `rows` come in this order: the run's loss, the paper's, the designs.
    wanted = [row for row in rows if row.get("group") not in ("paper", "term") or row.get("label") == best]
    lines = []
    for row in wanted[:_LINES]:
        points = [point for point in row.get("ideal_by_step") or [] if point[0] is not None]
        if len(points) > 1:
            steps, shares = zip(*points, strict=True)
            lines.append(Line(describe_row(row), [*map(float, steps)], [*map(fill_gap, shares)]))
    return lines
