"""A name for the contents of a data set, by which a selection knows the data that was scanned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from gradent.loading.preference_files import Row

__all__ = ["data_digest"]


def data_digest(rows: Sequence[Row]) -> str:
    """A name for the contents of all rows, readable or not: the same for the same data, whatever file holds it."""
    sums = hashlib.sha256()
    for row in rows:
        text = json.dumps(row.values, sort_keys=True, default=str) if row.problem is None else row.problem
        sums.update(text.encode(errors="replace") + b"\n")
    return sums.hexdigest()[:16]
