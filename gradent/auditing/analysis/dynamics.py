"""How the log-probs moved between the checkpoints of a run, and how much of it the first-order theory explains.

Source: the paper's equations (4) and (5): a step of size η on a pair changes `log π(y_w|x)` by η times the column
`chosen_change` and `log π(y_l|x)` by η times `rejected_change`. A run takes many steps on many pairs between two
checkpoints, with an optimizer of its own, so that η is fitted, and what it leaves unexplained is part of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.auditing.analysis.onset import logged_onset, measured_onset
from gradent.record import CASE_NAMES

__all__ = ["dynamics"]

SAME_REFERENCE = 1e-3
"""How far, of its size, a reference's mean log-prob may differ between checkpoints and still be the same reference."""

Columns = Mapping[str, Sequence[Any]]
Curves = Mapping[str, Sequence[Sequence[Any]]]
Floats = NDArray[np.float64]
Checkpoint = dict[int, Floats]
"""Pair -> `[logps, predictions]`, each of chosen and rejected: log-probs in nats, and changes to first order, nats per
unit of η."""


def dynamics(columns: Columns, curves: Curves) -> dict[str, Any] | None:
    """What happened to the log-probs over a run.

    Args:
        columns: the columns of `record.PAIR_COLUMNS`, with the rows of all checkpoints.
        curves: `{key: [[step, value], ...]}` of the trainer's log; may be empty.

    Returns:
        None where fewer than two checkpoints were measured and no curves of log-probs were logged. Else
        `onset`: the steps from which both log-probs stay below their start, `measured` on the pairs (see
        `measured_onset`) and `logged` on the curves `logged_keys` (see `logged_onset`); None where they do not.
        `start`: mean `chosen_logp` and `rejected_logp` of the reference, which are those of step 0; None without a
        reference, and where it is not one fixed model (a model that is its own reference).
        `intervals`: of each two successive checkpoints, over the `pairs` present at both: steps `from` and `to`;
        `chosen_change` and `rejected_change`, the mean change of the log-probs, nats; `step_size`, the one η >= 0 that
        fits the changes of both responses of all pairs best by least squares through the origin, from the predictions
        at `from`; `chosen_predicted` and `rejected_predicted`, η times their means; `explained`, `1 - SS_res/SS` of
        that fit with SS about zero, in 0 to 1; `chosen_sign` and `rejected_sign`, the share of the pairs with a
        prediction other than 0 whose change has its sign.
        `whole`: the same from the first to the last checkpoint, over the pairs present at all: predictions are the
        sums of the intervals', `step_size` the sum of their η; nothing is fitted anew, so `explained` may be below 0.
        `cases_realised`: the share of these pairs by what happened to their log-probs from first to last, in Table 1's
        cases (a change of exactly 0 counts as the wanted one, as in Condition 2; inactive: neither moved).
        `intervals` is empty, `whole` and `cases_realised` are None, where one checkpoint was measured.
    """
    checkpoints = _read_checkpoints(columns)
    start = _read_start(columns, checkpoints)
    logged, keys = logged_onset(curves)
    if len(checkpoints) < 2 and not keys:
        return None
    intervals = [_fit(*ends, checkpoints) for ends in pairwise(checkpoints)]
    return {
        "onset": {"measured": _find_onset(checkpoints, start), "logged": logged, "logged_keys": keys},
        "start": _describe_start(start),
        "intervals": intervals,
        **_describe_whole(checkpoints, intervals),
    }


def _read_checkpoints(columns: Columns) -> dict[int, Checkpoint]:
    """Step -> the pairs measured there, by step."""
    found: dict[int, Checkpoint] = {}
    names = ("step", "pair", "chosen_logp", "rejected_logp", "chosen_change", "rejected_change")
    for step, pair, *values in zip(*(columns[name] for name in names), strict=True):
        found.setdefault(int(step), {})[int(pair)] = np.array(values, dtype=np.float64).reshape(2, 2)
    return {step: found[step] for step in sorted(found)}


def _read_start(columns: Columns, checkpoints: Mapping[int, Checkpoint]) -> dict[int, Floats] | None:
    """Pair -> the reference's two log-probs, if there is one reference for all checkpoints."""
    names = ("step", "pair", "ref_chosen_logp", "ref_rejected_logp")
    found: dict[int, dict[int, Floats]] = {}
    for step, pair, chosen, rejected in zip(*(columns[name] for name in names), strict=True):
        if chosen is None or rejected is None:
            return None
        found.setdefault(int(step), {})[int(pair)] = np.array([chosen, rejected], dtype=np.float64)
    start: dict[int, Floats] = {}
    for step, reference in sorted(found.items()):
        # A model that is its own reference says nothing of step 0; at step 0 itself the two are one.
        if step > 0 and all(np.array_equal(reference[pair], checkpoints[step][pair][0]) for pair in reference):
            return None
        shared = [pair for pair in reference if pair in start]
        apart = sum(np.abs(reference[pair] - start[pair]).sum() for pair in shared)
        if apart > SAME_REFERENCE * sum(1 + np.abs(start[pair]).sum() for pair in shared):
            return None
        start = {**reference, **start}
    return start or None


def _find_onset(checkpoints: Mapping[int, Checkpoint], start: Mapping[int, Floats] | None) -> int | None:
    points = [(step, {pair: values[0] for pair, values in each.items()}) for step, each in checkpoints.items()]
    if start is not None and 0 not in checkpoints:
        points.insert(0, (0, dict(start)))
    return measured_onset(points)


def _describe_start(start: Mapping[int, Floats] | None) -> dict[str, float] | None:
    if start is None:
        return None
    chosen, rejected = np.mean(list(start.values()), axis=0)
    return {"chosen_logp": float(chosen), "rejected_logp": float(rejected)}


def _fit(begin: int, end: int, checkpoints: Mapping[int, Checkpoint]) -> dict[str, Any]:
    first, last = checkpoints[begin], checkpoints[end]
    shared = [pair for pair in first if pair in last]
    change, predicted = _changes(first, last, shared), _predictions(first, shared)
    squares = float((predicted**2).sum())
    size = max(0.0, float((change * predicted).sum()) / squares) if squares > 0 else None
    figures = _compare(change, predicted * (size or 0.0), size, predicted)
    if figures["explained"] is not None:
        figures["explained"] = max(0.0, figures["explained"])  # a fit is below 0 by rounding alone
    return {"from": begin, "to": end, **figures}


def _describe_whole(checkpoints: Mapping[int, Checkpoint], intervals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not intervals:
        return {"whole": None, "cases_realised": None}
    each = list(checkpoints.values())
    shared = [pair for pair in each[0] if all(pair in other for other in each)]
    change = _changes(each[0], each[-1], shared)
    predicted = np.zeros_like(change)
    for interval in intervals:
        predicted += (interval["step_size"] or 0.0) * _predictions(checkpoints[interval["from"]], shared)
    sizes = [interval["step_size"] for interval in intervals if interval["step_size"] is not None]
    ends = {"from": intervals[0]["from"], "to": intervals[-1]["to"]}
    whole = _compare(change, predicted, sum(sizes) if sizes else None, predicted)
    return {"whole": {**ends, **whole}, "cases_realised": _realised(change)}


def _changes(first: Checkpoint, last: Checkpoint, pairs: Sequence[int]) -> Floats:
    """Of chosen and rejected, float64 `[pairs, 2]`, nats."""
    return np.array([last[pair][0] - first[pair][0] for pair in pairs], dtype=np.float64).reshape(-1, 2)


def _predictions(first: Checkpoint, pairs: Sequence[int]) -> Floats:
    """Of chosen and rejected, float64 `[pairs, 2]`, nats per unit of η."""
    return np.array([first[pair][1] for pair in pairs], dtype=np.float64).reshape(-1, 2)


def _compare(change: Floats, predicted: Floats, size: float | None, direction: Floats) -> dict[str, Any]:
    """Realised beside predicted changes, `[pairs, 2]` each; the signs are those of `direction`."""
    figures: dict[str, Any] = {"pairs": len(change)}
    for column, side in enumerate(("chosen", "rejected")):
        signed = direction[:, column] != 0
        agree = np.sign(change[signed, column]) == np.sign(direction[signed, column])
        figures[f"{side}_change"] = _mean(change[:, column])
        figures[f"{side}_predicted"] = _mean(predicted[:, column])
        figures[f"{side}_sign"] = _mean(agree.astype(np.float64))
    total = float((change**2).sum())
    explained = 1 - float(((change - predicted) ** 2).sum()) / total if total > 0 else None
    return {**figures, "step_size": size, "explained": explained}


def _realised(change: Floats) -> dict[str, float] | None:
    if not len(change):
        return None
    moved = 1 + (change[:, 0] < 0) + 2 * (change[:, 1] > 0)  # the numbers of the cases, as in `verdict`
    case = np.where((change == 0).all(axis=1), 0, moved)
    return {name: float((case == number).mean()) for number, name in CASE_NAMES.items()}


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None
