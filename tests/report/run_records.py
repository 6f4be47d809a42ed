"""Records of runs whose numbers are known, as `EntanglementCallback(out=...)` writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradent.record import (
    GROUP_SOURCES,
    MOVED_COLUMNS,
    MOVED_SOURCES,
    PAIR_COLUMNS,
    ROW_COLUMNS,
    ROW_MOVED_COLUMNS,
)
from gradent.record.stream import PairStream, RowStream

Shape = Callable[[int, int], float]


def pair_rows(steps: range, chosen: Shape, rejected: Shape, pairs: int = 4, **fields: Any) -> list[dict[str, Any]]:
    """Pairs of which a step moves chosen and rejected by `chosen(step, pair)` and `rejected(step, pair)` nats.

    Of that, momentum is half, the partner twice as much the other way, and the rest is the response's own.
    """
    rows = []
    for step in steps:
        for pair in range(pairs):
            row: dict[str, Any] = dict.fromkeys([*PAIR_COLUMNS, *MOVED_COLUMNS])
            row |= {
                "checkpoint": "train", "step": step, "pair": pair, "chosen_sq": 4.0, "rejected_sq": 9.0, "inner": 3.0,
                "cosine": 0.5, "chosen_logp": -10.0 - pair, "rejected_logp": -12.0 - pair, "chosen_len": 3,
                "rejected_len": 4, "d_w": 0.5, "d_l": 0.5, "chosen_change": 1.0, "rejected_change": -1.0,
                "case": 1 + pair % 2,
            }  # fmt: skip
            for side, shape in (("chosen", chosen), ("rejected", rejected)):
                total = shape(step, pair)
                moved = dict.fromkeys(MOVED_SOURCES, 0.0) | {
                    "own": 2.5 * total, "partner": -2.0 * total, "momentum": 0.5 * total,
                }  # fmt: skip
                row |= {f"{side}_moved_{source}": value for source, value in moved.items()}
            rows.append(row | fields)
    return rows


def write_pairs(folder: Path, rows: list[dict[str, Any]]) -> Path:
    stream = PairStream(folder / "pairs.jsonl")
    stream.append(rows)
    stream.close()
    return stream.path


def write_rows(folder: Path, steps: range, change: Shape, rows: int = 8) -> Path:
    """Rows in groups of four, the even ones positive; a step moves row i by `change(step, i)` nats, all its own."""
    stream = RowStream(folder / "rows.jsonl")
    for step in steps:
        for number in range(rows):
            row: dict[str, Any] = dict.fromkeys([*ROW_COLUMNS, *ROW_MOVED_COLUMNS])
            row |= {
                "step": step, "row": number, "group": number // 4, "weight": -1.0 if number % 2 else 1.0, "logp": -5.0,
                "length": 3, "sq": 2.0,
            }  # fmt: skip
            row |= {f"moved_{source}": 0.0 for source in GROUP_SOURCES} | {"moved_own": change(step, number)}
            stream.append([row])
    stream.close()
    return stream.path
