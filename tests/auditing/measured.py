"""Columns as audits leave them, from gradients that are drawn or given: the truth is the gradients themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradent import losses
from gradent.pair_gram import PairGram
from gradent.record import PAIR_COLUMNS
from gradent.theory.conditions import verdict

Floats = NDArray[np.float64]


def drawn(pairs: int, seed: int, *, shared: float = 1.0, spread: float = 0.4) -> tuple[Floats, Floats]:
    """Gradients `[pairs, 12]` of chosen and rejected: a common part of that size, and one of their own."""
    draw = np.random.default_rng(seed)
    common = shared * draw.normal(size=(pairs, 12))
    scale = np.exp(spread * draw.normal(size=(pairs, 2, 1)))
    return tuple(scale[:, side] * (common + draw.normal(size=(pairs, 12))) for side in (0, 1))  # type: ignore[return-value]


def columns_of(
    chosen: Floats,
    rejected: Floats,
    *,
    step: int = 10,
    seed: int = 0,
    loss: losses.Loss | None = None,
    reference: bool = True,
    first: int = 0,
) -> dict[str, list[Any]]:
    """The columns of one checkpoint with these gradients, `[P, n]` each; log-probs and lengths are drawn."""
    draw = np.random.default_rng(seed)
    pairs = len(chosen)
    squares = (chosen**2).sum(1), (rejected**2).sum(1)
    inner = (chosen * rejected).sum(1)
    lengths = draw.integers(3, 40, (2, pairs))
    logps = -lengths * draw.uniform(0.5, 3.0, (2, pairs))
    references = logps + draw.normal(0, 2, (2, pairs))
    norms = np.sqrt(squares[0] * squares[1])
    made: dict[str, list[Any]] = {
        "checkpoint": [f"checkpoint-{step}"] * pairs,
        "step": [step] * pairs,
        "pair": list(range(first, first + pairs)),
        "chosen_sq": squares[0].tolist(),
        "rejected_sq": squares[1].tolist(),
        "inner": inner.tolist(),
        "cosine": [float(dot / norm) if norm > 0 else None for dot, norm in zip(inner, norms, strict=True)],
        "chosen_logp": logps[0].tolist(),
        "rejected_logp": logps[1].tolist(),
        "ref_chosen_logp": references[0].tolist() if reference else [None] * pairs,
        "ref_rejected_logp": references[1].tolist() if reference else [None] * pairs,
        "chosen_len": lengths[0].tolist(),
        "rejected_len": lengths[1].tolist(),
    }
    judged = verdict(gram_of(made), loss or losses.get("simpo"), *references_of(made))
    names = ("d_w", "d_l", "chosen_change", "rejected_change", "case")
    made |= {name: getattr(judged, name).tolist() for name in names}
    assert list(made) == list(PAIR_COLUMNS)
    return made


def gram_of(columns: dict[str, list[Any]]) -> PairGram:
    """The columns of one checkpoint as `measure` gave them."""
    wide = ("chosen_sq", "rejected_sq", "inner", "chosen_logp", "rejected_logp")
    entries: dict[str, Any] = {name: torch.tensor(columns[name], dtype=torch.float64) for name in wide}
    return PairGram(**entries, **{name: torch.tensor(columns[name]) for name in ("chosen_len", "rejected_len")})


def references_of(columns: dict[str, list[Any]]) -> list[torch.Tensor | None]:
    """The reference's log-probs of chosen and rejected."""
    names = ("ref_chosen_logp", "ref_rejected_logp")
    return [None if None in columns[name] else torch.tensor(columns[name], dtype=torch.float64) for name in names]


def stacked(*checkpoints: dict[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The rows of several checkpoints, one after the other."""
    return {name: [value for each in checkpoints for value in each[name]] for name in checkpoints[0]}


def has_no_nan(value: Any) -> bool:
    """Whether a record is plain JSON without nan and inf."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and has_no_nan(each) for key, each in value.items())
    if isinstance(value, list):
        return all(has_no_nan(each) for each in value)
    if isinstance(value, float):
        return bool(np.isfinite(value)) and type(value) is float
    return value is None or type(value) in {int, bool, str}
