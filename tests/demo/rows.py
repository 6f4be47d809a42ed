"""Made-up rows of a demo, for tests of findings and of the report."""

from __future__ import annotations

from typing import Any

from gradent.demo.task import STYLES
from gradent.record import PAIR_COLUMNS

PAIRS = 6
STEPS = (0, 5, 10)

# Style -> chosen log-prob at the last step, rejected log-prob there, cosine at every step; both start at -1.
AS_IN_THE_PAPER = {
    "single token": (-0.5, -3.0, -0.9),
    "short suffix": (-2.0, -4.0, 0.3),
    "long suffix": (-3.0, -5.0, 0.6),
    "prefix+suffix": (-3.0, -5.0, 0.7),
}


def make_rows(ends: dict[str, tuple[float, float, float | None]], spread: float = 0.01) -> dict[str, list[Any]]:
    """Columns of `pairs.parquet`: straight lines from -1 to the given ends, pairs `spread` apart from one another."""
    columns: dict[str, list[Any]] = {name: [] for name in PAIR_COLUMNS}
    for style in STYLES:
        chosen, rejected, cosine = ends[style]
        for step in STEPS:
            for pair in range(PAIRS):
                part, shift = step / STEPS[-1], spread * (pair - (PAIRS - 1) / 2)
                row = dict.fromkeys(PAIR_COLUMNS, 1.0) | {
                    "checkpoint": style,
                    "step": step,
                    "pair": pair,
                    "chosen_logp": -1 + part * (chosen + 1 + shift),
                    "rejected_logp": -1 + part * (rejected + 1 + shift),
                    "cosine": None if cosine is None else cosine + shift,
                    "chosen_len": 3,
                    "rejected_len": 3,
                    "case": 1 if style == "single token" else 2,
                }
                for name, value in row.items():
                    columns[name].append(value)
    return columns
