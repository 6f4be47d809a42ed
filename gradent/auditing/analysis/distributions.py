"""From the columns of `pairs.parquet` to the figures of `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.record import CASE_NAMES
from gradent.record.table import Floats, Table

__all__ = ["count_cases", "find_cases", "mean", "most_entangled", "summarize_columns", "summarize_modules"]

PERCENTILES = (5, 25, 50, 75, 95)
_MEANS = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp", "chosen_len", "rejected_len")


def summarize_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The keys `cosine`, `cases`, `weights`, `norms` and `logps` of a summary, from pair columns `[P]`."""
    table = Table.read(columns)
    case, chosen, rejected = table["case"], np.sqrt(table["chosen_sq"]), np.sqrt(table["rejected_sq"])
    return {
        "cosine": _summarize_cosine(table["cosine"]),
        "cases": {
            name: {"count": int((case == number).sum()), "share": float((case == number).mean())}
            for number, name in CASE_NAMES.items()
        },
        "weights": _summarize_weights(table),
        "norms": {
            "chosen_mean": mean(chosen), "rejected_mean": mean(rejected), "chosen_median": _median(chosen),
            "rejected_median": _median(rejected), "inner_mean": mean(table["inner"]),
        },
        "logps": {name: mean(table[name]) for name in _MEANS},
    }  # fmt: skip


def most_entangled(cosines: Sequence[float | None] | Floats, count: int = 5) -> list[int]:
    """Positions of the `count` pairs with the largest cosine, the largest first; pairs without one are left out."""
    values = np.asarray(cosines, dtype=np.float64)
    order = np.argsort(-values, kind="stable")[:count]
    return [int(place) for place in order if np.isfinite(values[place])]


def summarize_modules(sums: Mapping[str, Sequence[float] | Floats], pairs: int) -> dict[str, dict[str, float]]:
    """Means over pairs of `BatchResults.modules`: over all modules they add up to the mean cosine, or to 1."""
    names = ("cosine_part", "chosen_share", "rejected_share")
    return {
        module: {name: float(total) / pairs for name, total in zip(names, totals, strict=True)}
        for module, totals in sums.items()
    }


def _summarize_cosine(cosine: Floats) -> dict[str, Any]:
    defined = cosine[np.isfinite(cosine)]
    figures: dict[str, Any] = {"undefined": int(cosine.size - defined.size)}
    names = ["min", *(f"p{percent}" for percent in PERCENTILES), "max"]
    marks = np.percentile(defined, [0, *PERCENTILES, 100]) if defined.size else [None] * len(names)
    figures |= {name: None if mark is None else float(mark) for name, mark in zip(names, marks, strict=True)}
    return {**figures, "mean": mean(cosine), "share_positive": mean((defined > 0).astype(np.float64))}


def _summarize_weights(table: Table) -> dict[str, Any]:
    # Condition 2: chosen rises where d_w/d_l >= inner/‖g_w‖², rejected falls where d_w/d_l <= ‖g_l‖²/inner. The two are
    # stated where they bind, on active pairs with positive inner product and positive weights.
    d_w, d_l = table["d_w"], table["d_l"]
    active = table["case"] != 0
    positive = active & (d_w > 0) & (d_l > 0)
    binding = positive & (table["inner"] > 0)
    inner = table["inner"][binding]
    return {
        "d_w": _median(d_w[active]), "d_l": _median(d_l[active]), "ratio": _median(d_w[positive] / d_l[positive]),
        "active": int(active.sum()), "not_positive": int((active & ~positive).sum()), "bound_pairs": int(binding.sum()),
        "bound_ratio": _median(d_w[binding] / d_l[binding]),
        "needs_at_least": _median(inner / table["chosen_sq"][binding]),
        "needs_at_most": _median(table["rejected_sq"][binding] / inner),
        "balanced_ratio": _median(np.sqrt(table["rejected_sq"][binding] / table["chosen_sq"][binding])),
        "share_chosen_rises": mean((table["chosen_change"][active] >= 0).astype(np.float64)),
        "share_rejected_falls": mean((table["rejected_change"][active] <= 0).astype(np.float64)),
    }  # fmt: skip


def count_cases(case: NDArray[Any]) -> dict[str, float]:
    """Shares of the cases among pairs `[P]`, at least one, by name."""
    return {name: float((case == number).mean()) for number, name in CASE_NAMES.items()}


def find_cases(change: Floats) -> NDArray[Any]:
    """The numbers of the cases, as in `verdict`, that changes of chosen and rejected, `[P, 2]`, come to."""
    moved = 1 + (change[:, 0] < 0) + 2 * (change[:, 1] > 0)
    return np.where((change == 0).all(axis=1), 0, moved)


def mean(values: Floats) -> float | None:
    """The mean of the finite values; None without any."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else None


def _median(values: Floats) -> float | None:
    return float(np.median(values)) if values.size else None
