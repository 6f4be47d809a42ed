"""What another loss would do with the gradients that a run has: Condition 2 for many losses on one measurement.

The Gram entries of a pair depend on the model, not on the loss; a loss adds only its two weights. So every loss can be
judged on the same pairs at the price of arithmetic: on each pair alone, and, where vectors of all rows' gradients are
there, in one step on the mean loss of the whole sample. These are first-order statements about one small step from the
weights that the run arrived at; a run that had trained with that loss would have arrived elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gradent import losses
from gradent.auditing.analysis.columns import judge, with_verdict
from gradent.auditing.analysis.distributions import count_cases, summarize_columns
from gradent.auditing.analysis.loss_grid import label_loss, list_variants, read_hyperparameters
from gradent.auditing.analysis.recommendation import recommend
from gradent.auditing.analysis.steps import SampleStep
from gradent.auditing.analysis.token_masking import mask_row
from gradent.errors import GradentError
from gradent.losses import Loss
from gradent.losses.designs import rebalanced_weights
from gradent.record.table import Table
from gradent.theory.conditions import CASES, Verdict

__all__ = ["recommend", "what_if"]

Columns = Mapping[str, Any]

_WEIGHTS = ("ratio", "needs_at_least", "needs_at_most", "share_chosen_rises", "share_rejected_falls")
_FIGURES = ("cases", *_WEIGHTS, "within", "against_run", "sample")
_IDEAL = 1
_NORMALIZED = losses.get("pairwise_normalized", scale="constant")

NO_REFERENCE = "it needs a reference's log-probs, and none were measured: name the model that the run began with."


def what_if(
    columns: Columns, loss: Loss, tokens: Columns | None = None, sample: SampleStep | None = None
) -> list[dict[str, Any]]:
    """Other losses and hyperparameters on the gradients of the last step in `columns`, whose rows `sample` has."""
    # Source: the paper's Condition 2 and Table 1, Table 2's losses, and Section 5.
    table = Table.read(columns)
    checkpoints = [table.select(table["step"] == step) for step in np.unique(table["step"])]
    if not checkpoints:
        return []
    rows: list[dict[str, Any]] = []
    run: Tensor | None = None  # the last step's cases under the run's loss
    judged: list[Verdict | str] = []  # of the last step, row by row
    for variant in list_variants(loss):
        verdicts = [_try(variant.loss, checkpoint) for checkpoint in checkpoints]
        judged.append(verdicts[-1])
        if variant.group == "run" and isinstance(verdicts[-1], Verdict):
            run = verdicts[-1].case
        head = {
            "loss": variant.loss.name,
            "label": label_loss(variant.loss),
            "group": variant.group,  # run, paper (the ten losses at their defaults), sweep or design (Section 5)
            "hyperparameters": read_hyperparameters(variant.loss),
            "varied": variant.varied,  # the hyperparameter that a sweep varies
        }
        rows.append({**head, **_row(verdicts, checkpoints, run)})
    normalized = [_try(_NORMALIZED, checkpoint) for checkpoint in checkpoints]
    head = _design("pairwise_normalized", "Pairwise normalization")
    rows.append({**head, **_row(normalized, checkpoints, run)})
    judged.append(normalized[-1])
    calibrated = [_calibrate(_try(loss, checkpoint)) for checkpoint in checkpoints]
    head = _design("reward_calibration", f"{label_loss(loss)}, rewards calibrated")
    rows.append({**head, **_row(calibrated, checkpoints, run)})
    judged.append(calibrated[-1])
    masked = mask_row(tokens, checkpoints[-1], run)
    rows.append({**_design("token_masked", "Token masking (differing tokens kept)"), **masked})
    judged.append("its tokens are kept pair by pair")
    needed = (
        None if sample is None or isinstance(judged[0], str) else _with_nll(loss, judged[0], checkpoints[-1], sample)
    )
    if needed is not None:
        row, verdict = needed
        rows.append({**row, **_row([verdict], checkpoints[-1:], run)})
        judged.append(verdict)
    return [{**row, "sample": found} for row, found in zip(rows, _judge_sample(rows, judged, sample), strict=True)]


def _judge_sample(
    rows: Sequence[Columns], judged: Sequence[Verdict | str], sample: SampleStep | None
) -> list[dict[str, Any] | None]:
    """Each row's figures of a step on the whole sample; None where it was not measured, or there is no verdict."""
    if sample is None:
        return [None] * len(rows)
    cases = iter(sample.cases([each for each in judged if isinstance(each, Verdict)]))
    found = [next(cases) if isinstance(each, Verdict) else None for each in judged]
    run = next((case for row, case in zip(rows, found, strict=True) if row["group"] == "run"), None)
    return [
        None if case is None else {
            "cases": count_cases(case),
            "against_run": None if run is None else _compare(case == _IDEAL, run == _IDEAL),
        }
        for case in found
    ]  # fmt: skip


def _design(loss: str, label: str) -> dict[str, Any]:
    return {"loss": loss, "label": label, "group": "design", "hyperparameters": {}, "varied": None}


def _with_nll(
    loss: Loss, judged: Verdict, table: Table, sample: SampleStep | None
) -> tuple[dict[str, Any], Verdict] | None:
    """The run's loss with the likelihood term that it needs on the sample, and its verdict; None if it needs none."""
    if sample is None:
        return None
    lengths = table["chosen_len"].astype(np.float64)
    weight = sample.needed_nll(judged, lengths)
    if not weight:
        return None
    verdict = Verdict.from_weights(judged.gram, judged.d_w + weight / lengths.mean(), judged.d_l)
    row = {
        "loss": "nll_term", "label": f"{label_loss(loss)} + {weight:.2g} · NLL of chosen", "group": "term",
        "hyperparameters": {"nll_weight": weight}, "varied": None,
    }  # fmt: skip
    return row, verdict


def _calibrate(judged: Verdict | str) -> Verdict | str:
    """The verdict with both weights rebalanced to the middle of the two bounds, on average over the pairs."""
    # The geometric mean of Condition 2's bounds is ‖g_l‖/‖g_w‖.
    if isinstance(judged, str):
        return judged
    gram, d_w, d_l = judged.gram, judged.d_w, judged.d_l
    both = (gram.chosen_sq > 0) & (gram.rejected_sq > 0) & (d_w > 0) & (d_l > 0)
    if not bool(both.any()):
        return "no pair has two gradients that the loss weighs."
    middle = (gram.rejected_sq[both] / gram.chosen_sq[both]).double().log().mean() / 2
    weights = rebalanced_weights(d_w, d_l, middle)
    return Verdict.from_weights(gram, *(new.where(both, old) for new, old in zip(weights, (d_w, d_l), strict=True)))


def _try(loss: Loss, table: Table) -> Verdict | str:
    """The verdict, or why there is none."""
    if loss.needs_reference and np.isnan(table["ref_chosen_logp"]).any():
        return NO_REFERENCE
    try:
        return judge(table, loss)
    except GradentError as error:
        return str(error)


def _row(verdicts: Sequence[Verdict | str], checkpoints: Sequence[Table], run: Tensor | None) -> dict[str, Any]:
    last = verdicts[-1]
    figures: dict[str, Any] = dict.fromkeys(_FIGURES)
    if isinstance(last, Verdict):
        figures |= _summarize(last, checkpoints[-1])
        if run is not None:
            figures["against_run"] = _compare(last.case == _IDEAL, run == _IDEAL)
    return {
        "reason": last if isinstance(last, str) else None,  # why there are no numbers
        "pairs": checkpoints[-1].rows,
        **figures,
        "ideal_by_step": [
            [int(table["step"][0]), judged.fractions()["ideal"] if isinstance(judged, Verdict) else None]
            for table, judged in zip(checkpoints, verdicts, strict=True)
        ],
    }


def _compare(after: Any, before: Any) -> dict[str, int]:
    """How many pairs are in case 1 here and not with the run's loss, and the reverse."""
    return {"gained": int((after & ~before).sum()), "lost": int((before & ~after).sum())}


def _summarize(judged: Verdict, table: Table) -> dict[str, Any]:
    with np.errstate(over="ignore"):  # a ratio beyond float64 is inf, and then None
        figures = summarize_columns(with_verdict(table, judged))
    weights = {name: figures["weights"][name] for name in _WEIGHTS}
    # Dividing by the positive weights of a bound pair turns (9) and (10) into the two thresholds: both hold in case 1.
    bound = (judged.d_w > 0) & (judged.d_l > 0) & (judged.gram.inner > 0)
    return {
        # Shares of all pairs, of the active ones, and of the bound ones: those with a positive inner product.
        "cases": {name: figures["cases"][name]["share"] for name in (CASES[number] for number in (1, 2, 3, 4, 0))},
        **{name: value if value is not None and math.isfinite(value) else None for name, value in weights.items()},
        "within": float((judged.case[bound] == _IDEAL).double().mean()) if bool(bound.any()) else None,
    }
