"""Two audits held against each other in numbers: which pairs are the same, and what differs over them.

Differences are second minus first, at the last checkpoint of each. Over the same pairs they are paired: the mean of
each pair's difference, whose standard error leaves out how much the pairs differ among themselves.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradent.record.curves import mean_and_error
from gradent.record.table import Floats
from gradent.report.audit.sections.records import AuditRecords, Measured, read_audit
from gradent.report.audit.sections.settings import list_settings
from gradent.report.page.cases import CASES
from gradent.report.page.numbers import number, plural

__all__ = ["CLEAR", "Compared", "Comparison", "compare_audits", "compare_rows", "describe_finding"]

CLEAR = 2.0
"""Standard errors from which a difference is marked."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure of two audits."""

    name: str  # what it is, with its unit
    first: float  # in the first audit; nan where it does not exist
    second: float  # in the second
    difference: float  # second minus first
    error: float  # standard error of the difference; nan where none is stated, inf for a single pair
    pairs: int | None  # pairs that the difference is over; None where it is not over the same pairs
    share: bool = False  # whether the figure is a share of 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two audits and what there is to say of both."""

    first: AuditRecords  # one audit
    second: AuditRecords  # the other
    places: Sequence[tuple[int, int]]  # of the pairs that are the same, their places at the last checkpoint of either
    matching: str  # how pairs were matched, or why not, in a sentence
    settings: Sequence[tuple[str, str, str]]  # `(name, first, second)` of the settings that differ
    rows: Sequence[Compared]  # the figures
    transitions: Counter[tuple[str, str]]  # of the same pairs, by their cases in the first and in the second


def compare_audits(directory_a: str | os.PathLike[str], directory_b: str | os.PathLike[str]) -> Comparison:
    """Read two audits and hold them against each other."""
    first, second = read_audit(directory_a), read_audit(directory_b)
    places, matching = _match(first, second)
    rows: list[Compared] = []
    transitions: Counter[tuple[str, str]] = Counter()
    if first.last is not None and second.last is not None:
        a, b = first.last, second.last
        rows = [_compare(name, values(a), values(b), places) for name, values in _FIGURES.items()]
        transitions = Counter((a.case_of(left), b.case_of(right)) for left, right in places)
    left, right = list_settings(first.summary), list_settings(second.summary)
    names = dict.fromkeys([*left, *right])
    settings = [(name, left.get(name, "not set"), right.get(name, "not set")) for name in names]
    return Comparison(
        first=first, second=second, places=places, matching=matching, rows=rows, transitions=transitions,
        settings=[(name, a, b) for name, a, b in settings if a != b],
    )  # fmt: skip


def compare_rows(directory_a: str | os.PathLike[str], directory_b: str | os.PathLike[str]) -> list[Compared]:
    """The figures of two audits side by side, as a terminal may print them."""
    return list(compare_audits(directory_a, directory_b).rows)


def describe_finding(both: Comparison) -> str:
    """What differs, in a sentence: the cases first, then the log-probs; what became of A's largest case."""
    clear = [row for row in both.rows if row.difference and abs(row.difference) > CLEAR * row.error]
    shares = [row for row in clear if row.share]
    if shares:
        row = max(shares, key=lambda row: abs(row.difference))
        more = "more" if row.difference > 0 else "fewer"
        points, kind = f"{100 * abs(row.difference):.0f}", row.name.removeprefix("share ")
        return f"B has {points} points {more} of the pairs {kind} than A{_describe_transition(both)}"
    moved = [row for row in clear if "log π" in row.name and "‖" not in row.name]
    if moved:
        row = max(moved, key=lambda row: abs(row.difference))
        higher = "higher" if row.difference > 0 else "lower"
        return f"{row.name.removesuffix(', nats').capitalize()} is {number(abs(row.difference))} nats {higher} in B"
    return "No clear difference between the two" if both.rows else "One of the audits measured nothing"


def _describe_transition(both: Comparison) -> str:
    """Where most of the pairs of A's largest case are in B, if elsewhere."""
    sizes: Counter[str] = Counter()
    for (case, _), pairs in both.transitions.items():
        sizes[case] += pairs
    if not sizes:
        return ""
    (case, total), *_ = sizes.most_common(1)
    other, pairs = max(((b, n) for (a, b), n in both.transitions.items() if a == case), key=lambda item: item[1])
    names = {name: label.partition(": ")[2] or label for name, label in CASES.items()}
    return "" if other == case else f": {pairs} of A's {total} {names[case]} pairs are {names[other]} in B"


def _match(first: AuditRecords, second: AuditRecords) -> tuple[list[tuple[int, int]], str]:
    """Places of the pairs that are the same, by row of the data and, where both have them, by their texts."""
    if first.last is None or second.last is None:
        return [], "One of the audits measured no pair."
    at = {pair: place for place, pair in enumerate(second.last.pairs)}
    common = [(place, at[pair]) for place, pair in enumerate(first.last.pairs) if pair in at]
    apart = "so figures are over different pairs, and their differences are not paired."
    if first.sample and second.sample:
        rows = first.last.pairs
        same = [both for both in common if _texts(first, rows[both[0]]) == _texts(second, rows[both[0]])]
        if not same:
            return [], f"The audits have no pair in common (by row and text), {apart}"
        left = len(common) - len(same)
        other = f" {plural(left, 'row')} that both measured differ in their texts and are left out." if left else ""
        return same, f"{plural(len(same), 'pair')} were measured in both, matched by row and text.{other}"
    data = [records.summary["data"] for records in (first, second)]
    if any(data[0].get(key) != data[1].get(key) for key in ("source", "rows")):
        return [], f"The audits are of different data, {apart}"
    if not common:
        return [], f"The audits are of the same data and measured no row in common, {apart}"
    pairs = plural(len(common), "pair")
    return common, f"{pairs} were measured in both, matched by row alone: texts are not with both."


def _texts(records: AuditRecords, pair: int) -> tuple[Any, ...] | None:
    row = records.sample.get(pair)
    return None if row is None else (row["prompt"], row["chosen"], row["rejected"])


_FIGURES: dict[str, Callable[[Measured], Floats]] = {
    "mean cosine": lambda at: at.columns["cosine"],
    "median cosine": lambda at: at.columns["cosine"],
    "share in case 1 (ideal)": lambda at: at.is_case("ideal").astype(np.float64),
    "share in case 2 (both down)": lambda at: at.is_case("both_down").astype(np.float64),
    "share in case 3 (both up)": lambda at: at.is_case("both_up").astype(np.float64),
    "share in case 4 (reversed)": lambda at: at.is_case("reversed").astype(np.float64),
    "share inactive": lambda at: at.is_case("inactive").astype(np.float64),
    "mean log π(chosen), nats": lambda at: at.columns["chosen_logp"],
    "mean log π(rejected), nats": lambda at: at.columns["rejected_logp"],
    "mean margin log π(chosen) - log π(rejected), nats": lambda at: (
        at.columns["chosen_logp"] - at.columns["rejected_logp"]
    ),
    "mean ‖∇ log π(chosen)‖": lambda at: np.sqrt(at.columns["chosen_sq"]),
    "mean ‖∇ log π(rejected)‖": lambda at: np.sqrt(at.columns["rejected_sq"]),
}


def _compare(name: str, first: Floats, second: Floats, places: Sequence[tuple[int, int]]) -> Compared:
    """One figure over the same pairs where there are `places`, and over all pairs of each otherwise."""
    if places:
        first, second = first[[place for place, _ in places]], second[[place for _, place in places]]
        is_finite = np.isfinite(first) & np.isfinite(second)
        first, second = first[is_finite], second[is_finite]
    (left, left_error), (right, right_error) = mean_and_error(first), mean_and_error(second)
    if places:
        difference, error = mean_and_error(second - first)
    else:
        difference, error = right - left, math.hypot(left_error, right_error)
    if name.startswith("median"):
        medians = (np.nanmedian(values) if np.isfinite(values).any() else math.nan for values in (first, second))
        left, right = map(float, medians)
        difference, error = right - left, math.nan
    return Compared(
        name=name, first=left, second=right, difference=difference, error=error,
        pairs=len(first) if places else None, share=name.startswith("share"),
    )  # fmt: skip
