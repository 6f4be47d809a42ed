"""The cases of the paper's Table 1 in the words and the order that every report has them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradent.figures.charts import Series

__all__ = ["CASES", "CASES_EXPLAINED", "case_series", "share_of"]

CASES: dict[str, str] = {
    "ideal": "case 1: ideal", "both_down": "case 2: both down", "both_up": "case 3: both up", "reversed": "reversed",
    "inactive": "inactive",
}  # fmt: skip
"""Name of a case in the records to its name for readers. The colours of a page go by the records' names."""

CASES_EXPLAINED = (
    "Case 1 (ideal): chosen rises, rejected falls. Case 2 (both down): both log-probs fall. Case 3 (both up): both "
    "rise. Reversed: chosen falls, rejected rises. Inactive: the loss does not move the pair."
)


def case_series(shares: Mapping[str, list[float]]) -> list[Series]:
    """The pieces of stacked bars."""
    return [Series(label, shares[name], name) for name, label in CASES.items()]


def share_of(cases: Mapping[str, Any] | None, name: str) -> float | None:
    """A case's share, whether the records have it as a number or with its count."""
    share = None if cases is None else cases.get(name)
    share = share.get("share") if isinstance(share, Mapping) else share
    return None if share is None else float(share)
