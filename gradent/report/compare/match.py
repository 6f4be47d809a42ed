"""Two audits held against each other in numbers: which pairs are the same, and what differs over them.

Differences are second minus first, at the last checkpoint of each. Over the same pairs they are paired: the mean of
each pair's difference, whose standard error leaves out how much the pairs differ among themselves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.record import CASE_NAMES
from gradent.record.curves import mean_and_error
from gradent.report.audit.records import AuditRecords, Measured, read_audit
from gradent.report.audit.settings import list_settings
from gradent.report.page.numbers import plural

__all__ = ["Compared", "Comparison", "compare_audits", "compare_rows"]

Floats = NDArray[np.float64]
_TEXTS = ("prompt", "chosen", "rejected")
_NUMBERS = {name: number for number, name in CASE_NAMES.items()}


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
    # of the same pairs, how many are in a case of the first audit and in one of the second, by names
    transitions: dict[tuple[str, str], int]


def compare_audits(directory_a: str | os.PathLike[str], directory_b: str | os.PathLike[str]) -> Comparison:
    """Read two audits and hold them against each other."""
    first, second = read_audit(directory_a), read_audit(directory_b)
    places, matching = _match(first, second)
    return Comparison(
        first=first,
        second=second,
        places=places,
        matching=matching,
        settings=_differing(first, second),
        rows=_rows(first.last, second.last, places),
        transitions=_transitions(first.last, second.last, places),
    )


def compare_rows(directory_a: str | os.PathLike[str], directory_b: str | os.PathLike[str]) -> list[Compared]:
    """The figures of two audits side by side, as a terminal may print them."""
    return list(compare_audits(directory_a, directory_b).rows)


def _match(first: AuditRecords, second: AuditRecords) -> tuple[list[tuple[int, int]], str]:
    """Places of the pairs that are the same, by row of the data and, where both have them, by their texts."""
    if first.last is None or second.last is None:
        return [], "One of the audits measured no pair."
    at = {pair: place for place, pair in enumerate(second.last.pairs)}
    common = [(place, at[pair]) for place, pair in enumerate(first.last.pairs) if pair in at]
    apart = "so figures are over different pairs, and their differences are not paired."
    if first.sample and second.sample:
        rows = first.last.pairs
        same = [each for each in common if _texts(first, rows[each[0]]) == _texts(second, rows[each[0]])]
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
    return (
        common,
        f"{plural(len(common), 'pair')} were measured in both, matched by row alone: texts are not with both.",
    )


def _texts(records: AuditRecords, pair: int) -> tuple[Any, ...] | None:
    row = records.sample.get(pair)
    return None if row is None else tuple(row[name] for name in _TEXTS)


def _differing(first: AuditRecords, second: AuditRecords) -> list[tuple[str, str, str]]:
    left, right = list_settings(first.summary), list_settings(second.summary)
    names = dict.fromkeys([*left, *right])
    both = ((name, left.get(name, "not set"), right.get(name, "not set")) for name in names)
    return [each for each in both if each[1] != each[2]]


def _rows(first: Measured | None, second: Measured | None, places: Sequence[tuple[int, int]]) -> list[Compared]:
    if first is None or second is None:
        return []
    rows = [_mean("mean cosine", first.columns["cosine"], second.columns["cosine"], places)]
    rows.append(_median(first, second, places))
    for case, name in (
        ("ideal", "case 1 (ideal)"),
        ("both_down", "case 2 (both down)"),
        ("both_up", "case 3 (both up)"),
    ):
        inside = [(each.columns["case"] == _NUMBERS[case]).astype(np.float64) for each in (first, second)]
        rows.append(_mean(f"share in {name}", inside[0], inside[1], places, share=True))
    logps = {
        "mean log π(chosen), nats": _column("chosen_logp"),
        "mean log π(rejected), nats": _column("rejected_logp"),
        "mean margin log π(chosen) - log π(rejected), nats": _margin,
        "mean ‖∇ log π(chosen)‖": _norm("chosen_sq"),
        "mean ‖∇ log π(rejected)‖": _norm("rejected_sq"),
    }
    return rows + [_mean(name, value(first), value(second), places) for name, value in logps.items()]


def _column(name: str) -> Any:
    return lambda measured: measured.columns[name]


def _norm(name: str) -> Any:
    return lambda measured: np.sqrt(measured.columns[name])


def _margin(measured: Measured) -> Floats:
    return measured.columns["chosen_logp"] - measured.columns["rejected_logp"]


def _mean(
    name: str, first: Floats, second: Floats, places: Sequence[tuple[int, int]], *, share: bool = False
) -> Compared:
    if not places:
        means = [mean_and_error(each) for each in (first, second)]
        error = math.hypot(means[0][1], means[1][1])
        return Compared(
            name=name, first=means[0][0], second=means[1][0], difference=means[1][0] - means[0][0], error=error,
            pairs=None, share=share,
        )  # fmt: skip
    left, right = _taken(first, second, places)
    there = np.isfinite(left) & np.isfinite(right)
    left, right = left[there], right[there]
    difference, error = mean_and_error(right - left)
    return Compared(
        name=name, first=mean_and_error(left)[0], second=mean_and_error(right)[0], difference=difference, error=error,
        pairs=int(there.sum()), share=share,
    )  # fmt: skip


def _median(first: Measured, second: Measured, places: Sequence[tuple[int, int]]) -> Compared:
    values = [first.columns["cosine"], second.columns["cosine"]]
    if places:
        left, right = _taken(values[0], values[1], places)
        there = np.isfinite(left) & np.isfinite(right)
        values = [left[there], right[there]]
    medians = [float(np.median(each[np.isfinite(each)])) if np.isfinite(each).any() else math.nan for each in values]
    return Compared(
        name="median cosine", first=medians[0], second=medians[1], difference=medians[1] - medians[0], error=math.nan,
        pairs=len(values[0]) if places else None,
    )  # fmt: skip


def _taken(first: Floats, second: Floats, places: Sequence[tuple[int, int]]) -> tuple[Floats, Floats]:
    at = np.array(places, dtype=np.int64).reshape(-1, 2)
    return first[at[:, 0]], second[at[:, 1]]


def _transitions(
    first: Measured | None, second: Measured | None, places: Sequence[tuple[int, int]]
) -> dict[tuple[str, str], int]:
    if first is None or second is None:
        return {}
    counts: dict[tuple[str, str], int] = {}
    for one, other in places:
        key = CASE_NAMES[int(first.columns["case"][one])], CASE_NAMES[int(second.columns["case"][other])]
        counts[key] = counts.get(key, 0) + 1
    return counts
