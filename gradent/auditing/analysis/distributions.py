"""From the columns of `pairs.parquet` to the figures of `summary.json`. Numbers in, numbers out: no torch, no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.record import CASE_NAMES

__all__ = ["most_entangled", "summarize_columns", "summarize_modules"]

PERCENTILES = (5, 25, 50, 75, 95)

Floats = NDArray[np.float64]


def summarize_columns(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The distributions over all pairs.

    Args:
        columns: the columns of `record.PAIR_COLUMNS`, P values each.

    Returns:
        The keys `cosine`, `cases`, `weights`, `norms` and `logps` of `record.Summary`.
    """
    values = {
        name: np.array([np.nan if value is None else value for value in column], dtype=np.float64)
        for name, column in columns.items()
        if name not in {"checkpoint", "step", "pair"}
    }
    return {
        "cosine": _summarize_cosine(values["cosine"]),
        "cases": {
            name: {"count": int((values["case"] == case).sum()), "share": float((values["case"] == case).mean())}
            for case, name in CASE_NAMES.items()
        },
        "weights": _summarize_weights(values),
        "norms": _summarize_norms(values),
        "logps": {
            name: _mean(values[name])
            for name in (
                "chosen_logp",
                "rejected_logp",
                "ref_chosen_logp",
                "ref_rejected_logp",
                "chosen_len",
                "rejected_len",
            )
        },
    }


def most_entangled(cosines: Sequence[float | None], count: int = 5) -> list[int]:
    """Positions of the pairs with the largest cosine.

    Args:
        cosines: one a pair; None where undefined.
        count: how many.

    Returns:
        At most `count` positions, largest cosine first.
    """
    defined = [position for position, cosine in enumerate(cosines) if cosine is not None]
    return sorted(defined, key=lambda position: -float(cosines[position] or 0.0))[:count]


def summarize_modules(sums: Mapping[str, Sequence[float]], pairs: int) -> dict[str, dict[str, float]]:
    """Each module's part, averaged over pairs.

    Args:
        sums: `Scan.modules`, as three numbers a module.
        pairs: pairs that the sums run over.

    Returns:
        `{module: {"cosine_part", "chosen_share", "rejected_share"}}`; over all modules the parts add up to the mean
        cosine and the shares to 1.
    """
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
    return {**figures, "mean": _mean(cosine), "share_positive": _mean((defined > 0).astype(np.float64))}


def _summarize_weights(values: Mapping[str, Floats]) -> dict[str, Any]:
    # Condition 2: chosen rises where d_w/d_l >= inner/‖g_w‖², rejected falls where d_w/d_l <= ‖g_l‖²/inner. The two are
    # stated where they bind, on active pairs with positive inner product and positive weights.
    d_w, d_l = values["d_w"], values["d_l"]
    active = values["case"] != 0
    positive = active & (d_w > 0) & (d_l > 0)
    binding = positive & (values["inner"] > 0)
    inner = values["inner"][binding]
    return {
        "d_w": _median(d_w[active]),
        "d_l": _median(d_l[active]),
        "ratio": _median(d_w[positive] / d_l[positive]),
        "active": int(active.sum()),
        "not_positive": int((active & ~positive).sum()),
        "bound_pairs": int(binding.sum()),
        "bound_ratio": _median(d_w[binding] / d_l[binding]),
        "needs_at_least": _median(inner / values["chosen_sq"][binding]),
        "needs_at_most": _median(values["rejected_sq"][binding] / inner),
        "balanced_ratio": _median(np.sqrt(values["rejected_sq"][binding] / values["chosen_sq"][binding])),
        "share_chosen_rises": _mean((values["chosen_change"][active] >= 0).astype(np.float64)),
        "share_rejected_falls": _mean((values["rejected_change"][active] <= 0).astype(np.float64)),
    }


def _summarize_norms(values: Mapping[str, Floats]) -> dict[str, Any]:
    chosen, rejected = np.sqrt(values["chosen_sq"]), np.sqrt(values["rejected_sq"])
    return {
        "chosen_mean": _mean(chosen),
        "rejected_mean": _mean(rejected),
        "chosen_median": _median(chosen),
        "rejected_median": _median(rejected),
        "inner_mean": _mean(values["inner"]),
    }


def _mean(values: Floats) -> float | None:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if defined.size else None


def _median(values: Floats) -> float | None:
    return float(np.median(values)) if values.size else None
