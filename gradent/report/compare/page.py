"""The page of `gradent compare`: two audits side by side, what differs in their settings first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gradent.errors import InputError
from gradent.figures.charts import Bars, Chart, fill_gap
from gradent.record.atomic import make_directory
from gradent.report.audit.sections.losses import shown_rows
from gradent.report.audit.sections.pairs import pair_quotes
from gradent.report.audit.sections.records import AuditRecords, Row
from gradent.report.audit.sections.settings import describe_loss
from gradent.report.audit.sections.steps import STEP
from gradent.report.compare.match import CLEAR, Compared, Comparison, compare_audits, compare_rows, describe_finding
from gradent.report.page.cases import CASES, CASES_EXPLAINED, case_series, share_of
from gradent.report.page.html import Page, Section, write_page
from gradent.report.page.numbers import NOTHING, change, count, fixed, number, percent, plural, step_name
from gradent.report.page.parts import Fold, Notice, Table

__all__ = ["compare_rows", "describe_difference", "write_comparison"]

_MOVED = 10  # pairs whose cosine differs most


def write_comparison(
    directory_a: str | os.PathLike[str], directory_b: str | os.PathLike[str], out: str | os.PathLike[str]
) -> Path:
    """Write the page of two audits."""
    target = Path(out) / "compare.html" if Path(out).is_dir() else Path(out)
    if target.name == "report.html" and (target.parent / "summary.json").exists():
        raise InputError(f"{target}: is the page of an audit. Choose another --out, such as compare.html.")
    make_directory(target.parent, [target.name])
    return write_page(target, _to_page(compare_audits(directory_a, directory_b)))


def describe_difference(row: Compared) -> str:
    """A difference with its standard error."""
    if not row.share:
        return change(row.first, row.first + row.difference, row.error)
    text = change(0.0, 100 * row.difference, 100 * row.error)
    return text if text == NOTHING else f"{text} points"


def _to_page(both: Comparison) -> Page:
    sections = [
        _settings_section(both), _figure_section(both), _case_section(both), *_curve_sections(both),
        _loss_section(both), _pair_section(both),
    ]  # fmt: skip
    return Page(
        title=describe_finding(both),
        lead="Two audits side by side. Differences are B minus A, at the last measured checkpoint of each.",
        facts=[fact for name, records in _named(both) for fact in _facts(name, records)],
        sections=[section for section in sections if section is not None],
        foot=f"gradent {both.second.summary['gradent_version']}. The numbers behind this page are in the records of "
        "the two audits.",
        notices=_notices(both),
    )


def _named(both: Comparison) -> list[tuple[str, AuditRecords]]:
    return [("A", both.first), ("B", both.second)]


def _facts(name: str, records: AuditRecords) -> list[tuple[str, str]]:
    last = records.last
    measured = "nothing measured" if last is None else f"{step_name(last.step)}, {plural(len(last.pairs), 'pair')}"
    model = str(records.summary["model"].get("checkpoint"))
    named = records.name if records.name == model else f"{records.name}, {model}"
    return [(name, f"{named}: {measured}, {describe_loss(records.summary['loss'])}")]


def _notices(both: Comparison) -> list[Notice]:
    notices = [
        Notice(f"{name} is not complete.", "It was stopped before everything was measured.", warns=True)
        for name, records in _named(both)
        if not records.summary["complete"]
    ]
    return [*notices, Notice("" if both.places else "Not the same pairs", both.matching, warns=not both.places)]


def _settings_section(both: Comparison) -> Section:
    text = "What was set or read differently. Everything else is the same in both."
    if not both.settings:
        return Section("What differs in the settings", "Nothing: all settings are the same.", [])
    serves = "Tells you whether the two can be held against each other at all."
    return Section("What differs in the settings", text, [Table(("Setting", "A", "B"), both.settings)], serves)


def _figure_section(both: Comparison) -> Section:
    serves = "Tells you which of the two is less entangled, and by more than chance."
    if not both.rows:
        return Section("Differences", "One of the audits measured nothing.", [], serves)
    rows = []
    for row in both.rows:
        shown, mark = percent if row.share else number, " *" if abs(row.difference) > CLEAR * row.error else ""
        difference = describe_difference(row) + mark
        rows.append([row.name, shown(row.first), shown(row.second), difference, count(row.pairs)])
    caption = "Over the pairs of both" if both.places else "Over all pairs of each"
    table = Table(["Figure", "A", "B", "B minus A", "Same pairs"], rows, caption=caption, figures_from=1)
    text = (
        "± is one standard error of the difference; * marks what exceeds two. Sequence log-probs under different "
        "tokenizers are not of the same tokens."
    )
    return Section("Differences", text, [table], serves)


def _case_section(both: Comparison) -> Section | None:
    audits = [(name, records.last) for name, records in _named(both) if records.last is not None]
    if not audits:
        return None
    shares = {case: [last.share(case) for _, last in audits] for case in CASES}
    names = [f"{name}, {step_name(last.step)}" for name, last in audits]
    parts: list[Bars | Table] = [Bars("audit", "share of pairs", names, case_series(shares), percent=True)]
    if both.transitions:
        rows = [[label, *(count(both.transitions[case, other]) for other in CASES)] for case, label in CASES.items()]
        caption = "Pairs of both, by their case in A (rows) and in B (columns)"
        parts.append(Table(["In A", *CASES.values()], rows, caption=caption, figures_from=1))
    serves = "Tells you which pairs a change has helped, and which it has harmed."
    return Section("Cases", CASES_EXPLAINED, parts, serves)


def _curve_sections(both: Comparison) -> list[Section]:
    named = _named(both)
    if max(len(records.measured) for _, records in named) < 2:
        return []
    sides = [(name, records, side) for name, records in named for side in ("chosen", "rejected")]
    logps = [
        replace(records.mean_line(f"{side}_logp", f"{name}: {side}"), colour=side, dashed=name == "B")
        for name, records, side in sides
    ]
    cosines = [records.quartile_line("cosine", f"{name}: median, band: quartiles") for name, records in named]
    return [
        Section(
            "Log-probs over steps", "Means over the pairs of each audit, with one standard error. Colour: response; "
            "solid: A, broken: B.",
            [Chart(STEP, "mean log π(response), nats", logps)],
            "Tells you which run keeps chosen up while rejected falls.",
        ),
        Section(
            "Cosines over steps", "", [Chart(STEP, "cosine of the two gradients", cosines, zero=True)],
            "Tells you in which run entanglement grows.",
        ),
    ]  # fmt: skip


def _loss_section(both: Comparison) -> Section | None:
    tables = [_by_loss(records) for _, records in _named(both)]
    names = list(dict.fromkeys(name for table in tables for name in table))
    if not names:
        return None
    rows = []
    for name in names:
        cases = [(table.get(name) or {}).get("cases") for table in tables]
        if cases[0] == cases[1]:
            continue
        ideal, down = ([fill_gap(share_of(shares, case)) for shares in cases] for case in ("ideal", "both_down"))
        rows.append([name, *map(percent, ideal), change(*(100 * share for share in ideal)), *map(percent, down)])
    same = len(names) - len(rows)
    header = ["Loss", "Case 1 in A", "In B", "Points", "Case 2 in A", "In B"]
    caption = "Shares of the pairs that each audit measured (of token masking: whose tokens it measured)"
    table = Table(header, rows, caption=caption, figures_from=1)
    text = "Each loss on the gradients of each audit's last checkpoint."
    text += f" {same} of the {len(names)} losses judge both alike and are left out." if same else ""
    parts = [table] if rows else []
    return Section("What if: other losses", text, parts, "Tells you whether one loss would serve both better.")


def _by_loss(records: AuditRecords) -> dict[str, Row]:
    """Rows by name; the run's own loss goes by that, whichever it is."""
    rows = shown_rows(records.summary["what_if"])
    return {"the run's own" if row.get("group") == "run" else str(row.get("label")): row for row in rows}


def _pair_section(both: Comparison) -> Section | None:
    first, second = both.first.last, both.second.last
    if first is None or second is None or not both.places:
        return None
    pairs = []
    for left, right in both.places:
        a, b = float(first.columns["cosine"][left]), float(second.columns["cosine"][right])
        if abs(b - a) > 0:
            pairs.append((left, [first.case_of(left), second.case_of(right)], a, b))
    pairs = sorted(pairs, key=lambda pair: -abs(pair[3] - pair[2]))[:_MOVED]
    if not pairs:
        return None
    rows = [
        [f"{first.pairs[place]:,}", *(CASES[case] for case in cases), fixed(a), fixed(b), fixed(b - a)]
        for place, cases, a, b in pairs
    ]
    header = ["Row", "Case in A", "Case in B", "Cosine in A", "In B", "B minus A"]
    parts: Sequence[Table | Fold] = [
        Table(header, rows, caption="Pairs whose cosine differs most", figures_from=3),
        Fold("Their texts", [quote for place, *_ in pairs for quote in pair_quotes(both.first, place)]),
    ]
    return Section("Which pairs moved", "Rows of the data are counted from 0.", parts, "Tells you where to look first.")
