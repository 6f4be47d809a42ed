"""Sections on the pairs themselves: the most and the least entangled, and what goes with entanglement."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradent.report.audit.sections.records import AuditRecords, Measured, Row
from gradent.report.page.cases import CASES
from gradent.report.page.html import Section
from gradent.report.page.numbers import NOTHING, count, fixed, number, percent, plural
from gradent.report.page.parts import Cell, Fold, Quote, Table

__all__ = ["pair_quotes", "pair_section", "property_section", "ranked_pairs"]

_RANKED = 8  # pairs at each end
_CONSTANT = "the property is the same for all pairs"  # the reason of a property without a correlation
_LONGEST = 5000  # characters of a text

_COUNTED = {
    "prompt_len": "Prompt", "chosen_len": "Chosen", "rejected_len": "Rejected", "shared_prefix": "Shared start",
    "shared_suffix": "Shared end", "edit_distance": "Edits",
}  # fmt: skip


def ranked_pairs(measured: Measured, most: int) -> tuple[list[int], list[int]]:
    """Places of the pairs at both ends of the cosine."""
    cosine = measured.columns["cosine"]
    order = [int(place) for place in np.argsort(-cosine, kind="stable") if math.isfinite(cosine[place])]
    top = order[:most]
    return top, order[len(top) :][::-1][:most]


def pair_section(records: AuditRecords) -> Section:
    """The pairs at both ends, with their properties and texts."""
    title, serves = "Which pairs", "Tells you which pairs to rewrite, to filter, or to look at first."
    last = records.last
    if last is None:
        return Section(title, "No pair was measured.", [], serves)
    top, bottom = ranked_pairs(last, _RANKED)
    parts: list[Table | Fold] = []
    for places, name in ((top, "The most entangled pairs"), (bottom, "The least entangled pairs")):
        if places:
            quotes = [quote for place in places for quote in pair_quotes(records, place)]
            parts += [_pair_table(records, places, name), Fold(f"{name}: their texts", quotes)]
    text = "Rows of the data are counted from 0."
    if records.sample:
        text += " Lengths, shared parts and edits (that make one response the other) are counted in tokens."
    else:
        text += " Texts and properties are in sample.parquet, which is not beside this page."
    if len(records.measured) > 1:
        text += f" Cosines are those of the first measured checkpoint and of the last, step {last.step:,}."
    return Section(title, text, parts, serves)


def property_section(records: AuditRecords) -> Section | None:
    """What goes with entanglement."""
    rows = [row for row in records.summary["properties"] if row.get("reason") != _CONSTANT]
    if not rows:
        return None
    same = [str(row.get("label")) for row in records.summary["properties"] if row.get("reason") == _CONSTANT]
    constant = f" Left out, for it is the same in all pairs: {', '.join(same)}." if same else ""
    at = " at the last checkpoint" if records.summary["run"] is not None else ""
    quarters = max((len(row.get("groups") or []) for row in rows), default=0)
    names = ["Lowest quarter", "Second", "Third", "Highest quarter"]
    if quarters != len(names):
        names = [f"Group {place + 1}" for place in range(quarters)]
    header, cells = ["Property", "ρ", "95% interval", "Pairs", *names], [_property_row(row, quarters) for row in rows]
    caption = "Spearman's ρ of each property with the cosine, and the pairs in groups by that property"
    return Section(
        "What goes with entanglement",
        f"Spearman's rank correlation of a property of the pair with its cosine{at}, with its 95% "
        "interval: one that holds 0 may be chance. Beside it, the pairs in groups by the property: its range, their "
        "cosine, and their share in case 1. A relation in this sample is no cause by itself." + constant,
        [Table(header, cells, caption=caption, figures_from=1)],
        "Tells you which kind of pair to collect more of, and which to avoid.",
    )


def _property_row(row: Row, quarters: int) -> list[Cell | str]:
    low, high = row.get("low"), row.get("high")
    groups = [_group_cell(group) for group in row.get("groups") or []]
    label = str(row.get("label") or row.get("property") or "")
    name = Cell((label, *(str(row[key]) for key in ("unit", "reason") if row.get(key))))
    interval = NOTHING if low is None or high is None else f"{fixed(low)} to {fixed(high)}"
    missing = [""] * (quarters - len(groups))
    return [name, fixed(row.get("spearman")), interval, count(row.get("pairs")), *groups, *missing]


def _group_cell(group: Row) -> Cell:
    low, high = group.get("low"), group.get("high")
    span = _edge(low) if low == high else f"{_edge(low)} to {_edge(high)}"
    return Cell((span, f"cosine {fixed(group.get('cosine'))}", f"case 1 {percent(group.get('ideal'))}"))


def _edge(value: float | None) -> str:
    return count(value) if value is not None and float(value).is_integer() else number(value)


def _pair_table(records: AuditRecords, places: Sequence[int], caption: str) -> Table:
    first, last = records.first, records.last
    assert first is not None
    assert last is not None
    before = dict(zip(first.pairs, first.columns["cosine"], strict=True)) if first is not last else None
    counted = _COUNTED if records.sample else {}
    rows: list[list[Cell | str]] = []
    for place in places:
        pair = last.pairs[place]
        texts = records.sample.get(pair, {})
        cosine, chosen, rejected = (last.columns[name][place] for name in ("cosine", "chosen_logp", "rejected_logp"))
        cut = [f"{plural(texts['truncated'], 'response')} cut"] if texts.get("truncated") else []
        cells = [CASES[last.case_of(place)], fixed(cosine), *([] if before is None else [fixed(before.get(pair))])]
        cells += [number(chosen), number(rejected), *(count(texts.get(name)) for name in counted)]
        rows.append([Cell((f"{pair:,}", *cut)), *cells])
    header = ["Row", "Case", "Cosine", *([] if before is None else ["At first"])]
    header += ["Chosen log-prob", "Rejected log-prob", *counted.values()]
    return Table(header, rows, caption=caption, figures_from=2)


def pair_quotes(records: AuditRecords, place: int) -> list[Quote]:
    """The texts of a pair of the last checkpoint, as far as the records have them."""
    assert records.last is not None
    pair = records.last.pairs[place]
    texts = records.sample.get(pair)
    if texts is None:
        texts = next((row for row in records.summary["most_entangled"] if row.get("pair") == pair), {})
    where = f" ({texts['where']})" if texts.get("where") else ""
    quotes = []
    for side in ("prompt", "chosen", "rejected"):
        if texts.get(side) is not None:
            text = str(texts[side])
            left = len(text) - _LONGEST
            more = f"…\n({left:,} more characters are in sample.parquet)" if left > 0 else ""
            quotes.append(Quote(f"Row {pair:,}{where}: {side}", text[:_LONGEST] + more))
    return quotes or [Quote(f"Row {pair:,}", "Its text is not in the records.")]
