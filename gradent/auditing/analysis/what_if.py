"""What another loss would do with the gradients that a run has: Condition 2 for many losses on one measurement.

The Gram entries of a pair depend on the model, not on the loss; a loss adds only its two weights. So every loss can be
judged on the same pairs at the price of arithmetic. It is a first-order statement about one small step on a pair's own
loss, from the weights that the run arrived at; a run that had trained with that loss would have arrived elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradent import losses
from gradent.auditing.analysis.distributions import summarize_columns
from gradent.auditing.analysis.loss_grid import label_loss, list_variants, read_hyperparameters
from gradent.auditing.analysis.recommendation import recommend
from gradent.auditing.analysis.token_masking import mask_row
from gradent.errors import GradentError
from gradent.losses import Loss
from gradent.pair_gram import PairGram
from gradent.theory.conditions import CASES, Verdict, verdict

__all__ = ["recommend", "what_if"]

Columns = Mapping[str, Sequence[Any]]

_GRAM = ("chosen_sq", "rejected_sq", "inner", "chosen_logp", "rejected_logp")
_LENGTHS = ("chosen_len", "rejected_len")
_JUDGED = ("d_w", "d_l", "chosen_change", "rejected_change", "case")
_WEIGHTS = ("ratio", "needs_at_least", "needs_at_most", "share_chosen_rises", "share_rejected_falls")
_FIGURES = ("cases", *_WEIGHTS, "within", "against_run")
_IDEAL = 1
_NORMALIZED = losses.get("pairwise_normalized", scale="constant")

NO_REFERENCE = "it needs a reference's log-probs, and none were measured: name the model that the run began with."


def what_if(columns: Columns, loss: Loss, tokens: Columns | None = None) -> list[dict[str, Any]]:
    """Other losses and hyperparameters on the gradients of the last step in `columns`.

    Source: the paper's Condition 2 and Table 1, Table 2's losses, and Section 5.

    Args:
        columns: the columns of `record.PAIR_COLUMNS`, with the rows of all checkpoints.
        loss: the run's own. One of `losses.from_callable` is called once a step, with all pairs as one batch.
        tokens: the columns of `record.TOKEN_COLUMNS`, of some of the last step's pairs; None without any.

    Returns:
        A row a loss; none without a pair. Shares are fractions of 1, a number that does not exist is None.
        `group` is "run" (the loss given), "paper" (the ten losses at their defaults, Appendix C), "sweep" (one
        hyperparameter `varied`) or "design" (Section 5's pairwise normalization, and its token masking, of the pairs of
        `tokens` alone); `loss`, `label`, `hyperparameters` name it. `reason` says why there are no numbers, else None.
        `pairs` is P.
        `cases`: the share of the P pairs in each case. `ratio`: median d_w/d_l over the active pairs with positive
        weights. Of these the bound pairs, with a positive inner product, give `needs_at_least` and `needs_at_most`
        (medians of what (9) and (10) ask of the ratio) and `within`, the share that meets its own two.
        `share_chosen_rises` and `share_rejected_falls` are over active pairs. `ideal_by_step`: `[step, share]` of case
        1 at each step. `against_run`: how many of the P pairs are in case 1 here and not with the run's loss
        (`gained`), and the reverse (`lost`).
    """
    checkpoints = [_read_checkpoint(columns, step) for step in sorted(set(columns["step"]))]
    if not checkpoints:
        return []
    rows: list[dict[str, Any]] = []
    run: Tensor | None = None
    for variant in list_variants(loss):
        each = [_judge(variant.loss, checkpoint) for checkpoint in checkpoints]
        last = each[-1]
        if variant.group == "run" and isinstance(last, Verdict):
            run = last.case
        head = {
            "loss": variant.loss.name,
            "label": label_loss(variant.loss),
            "group": variant.group,
            "hyperparameters": read_hyperparameters(variant.loss),
            "varied": variant.varied,
        }
        rows.append({**head, **_row(each, checkpoints, run)})
    normalized = [_judge(_NORMALIZED, checkpoint) for checkpoint in checkpoints]
    rows.append({**_design("pairwise_normalized", "Pairwise normalization"), **_row(normalized, checkpoints, run)})
    masked = _design("token_masked", "Token masking (differing tokens kept)")
    return [*rows, {**masked, **mask_row(tokens, checkpoints[-1].step, checkpoints[-1].columns["pair"], run)}]


def _design(loss: str, label: str) -> dict[str, Any]:
    return {"loss": loss, "label": label, "group": "design", "hyperparameters": {}, "varied": None}


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """The pairs of one step: its columns, the same as tensors, and the reference's log-probs where there are any."""

    step: int
    columns: dict[str, list[Any]]
    gram: PairGram
    reference: tuple[Tensor, Tensor] | None


def _read_checkpoint(columns: Columns, step: int) -> _Checkpoint:
    at = [row for row, each in enumerate(columns["step"]) if each == step]
    here = {name: [values[row] for row in at] for name, values in columns.items()}
    entries: dict[str, Any] = {name: torch.tensor(here[name], dtype=torch.float64) for name in _GRAM}
    entries |= {name: torch.tensor(here[name], dtype=torch.int64) for name in _LENGTHS}
    given = here["ref_chosen_logp"], here["ref_rejected_logp"]
    reference: tuple[Tensor, Tensor] | None = None
    if not any(value is None for side in given for value in side):
        reference = torch.tensor(given[0], dtype=torch.float64), torch.tensor(given[1], dtype=torch.float64)
    return _Checkpoint(step=int(step), columns=here, gram=PairGram(**entries), reference=reference)


def _judge(loss: Loss, checkpoint: _Checkpoint) -> Verdict | str:
    """The verdict, or why there is none."""
    if loss.needs_reference and checkpoint.reference is None:
        return NO_REFERENCE
    try:
        return verdict(checkpoint.gram, loss, *(checkpoint.reference or (None, None)))
    except GradentError as error:
        return str(error)


def _row(each: Sequence[Verdict | str], checkpoints: Sequence[_Checkpoint], run: Tensor | None) -> dict[str, Any]:
    last = each[-1]
    figures: dict[str, Any] = dict.fromkeys(_FIGURES)
    if isinstance(last, Verdict):
        figures |= _summarize(last, checkpoints[-1].columns)
        if run is not None:
            here, there = last.case == _IDEAL, run == _IDEAL
            figures["against_run"] = {"gained": int((here & ~there).sum()), "lost": int((there & ~here).sum())}
    return {
        "reason": last if isinstance(last, str) else None,
        "pairs": len(checkpoints[-1].gram),
        **figures,
        "ideal_by_step": [
            [checkpoint.step, judged.fractions()["ideal"] if isinstance(judged, Verdict) else None]
            for checkpoint, judged in zip(checkpoints, each, strict=True)
        ],
    }


def _summarize(judged: Verdict, columns: Columns) -> dict[str, Any]:
    values = {name: getattr(judged, name).tolist() for name in _JUDGED}
    with np.errstate(over="ignore"):  # a ratio beyond float64 is inf, and then None
        figures = summarize_columns({**columns, **values})
    # Dividing by the positive weights of a bound pair turns (9) and (10) into the two thresholds: both hold in case 1.
    bound = (judged.d_w > 0) & (judged.d_l > 0) & (judged.gram.inner > 0)
    return {
        "cases": {name: figures["cases"][name]["share"] for name in (CASES[number] for number in (1, 2, 3, 4, 0))},
        **{name: _finite(figures["weights"][name]) for name in _WEIGHTS},
        "within": float((judged.case[bound] == _IDEAL).double().mean()) if bool(bound.any()) else None,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
