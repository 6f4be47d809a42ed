"""Which rows of measured steps moved others most, with their texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradent.report.live.window import Push

__all__ = ["MOST_LETTERS", "find_pushes"]

MOST_LETTERS = 2000
"""Of a text in a table."""

_MOST = 5


def find_pushes(records: Sequence[Any], name: Callable[[Any, int], str], text: Callable[[Any, int], str]) -> list[Push]:
    """The largest pushes of steps with accounts and tokens; `name` and `text` are of a record's row."""
    found: list[tuple[float, Any, int, int]] = []
    for record in records:
        if record.attribution is None or record.batch is None or not record.attribution.pushes.numel():
            continue
        sizes = record.attribution.pushes.abs().nan_to_num().fill_diagonal_(0.0)
        best = sizes.flatten().topk(min(_MOST, sizes.numel()))
        for size, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append((size, record, place // len(sizes), place % len(sizes)))
    largest = [item for item in sorted(found, key=lambda item: -item[0])[:_MOST] if item[0]]
    return [
        Push(
            step=record.step, moved=name(record, row), text=text(record, row),
            change=float(record.attribution.total[row]), by=name(record, by), by_text=text(record, by),
            push=float(record.attribution.pushes[row, by]),
        )
        for _, record, row, by in largest
    ]  # fmt: skip
