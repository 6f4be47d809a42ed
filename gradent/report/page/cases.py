"""The cases of the paper's Table 1 in the words and the order that every report has them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradent.report.page.charts import Series

__all__ = ["CASES", "CASES_EXPLAINED", "CASE_COLOURS", "case_series", "share_of"]

CASES: dict[str, str] = {
    "ideal": "case 1: ideal",
    "both_down": "case 2: both down",
    "both_up": "case 3: both up",
    "reversed": "reversed",
    "inactive": "inactive",
}
"""Name of a case in the records to its name for readers. The colours of a page go by the records' names."""

CASE_COLOURS: dict[str, str] = {
    "ideal": "#2a9d8f",
    "both_down": "#e76f51",
    "both_up": "#e9c46a",
    "reversed": "#9b2226",
    "inactive": "#adb5bd",
}
"""Of the cases, where a picture does not get its colours from the page."""

CASES_EXPLAINED = (
    "Case 1 (ideal): chosen rises, rejected falls. Case 2 (both down): both log-probs fall. Case 3 (both up): both "
    "rise. Reversed: chosen falls, rejected rises. Inactive: the loss does not move the pair."
)


def case_series(shares: Mapping[str, list[float]]) -> list[Series]:
    """The pieces of stacked bars."""
    return [Series(label, shares[name], name) for name, label in CASES.items()]


def share_of(cases: Mapping[str, Any] | None, name: str) -> float | None:
    """A case's share, whether the records have it as a number or with its count."""
    found = None if cases is None else cases.get(name)
    share = found.get("share") if isinstance(found, Mapping) else found
    return None if share is None else float(share)
