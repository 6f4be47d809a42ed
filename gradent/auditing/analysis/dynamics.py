"""How the log-probs moved between the checkpoints of a run, and how much of it the first-order theory explains.

Source: the paper's equations (4) and (5): a step of size η on a pair changes `log π(y_w|x)` by η times the column
`chosen_change` and `log π(y_l|x)` by η times `rejected_change`. A run takes many steps on many pairs between two
checkpoints, with an optimizer of its own, so that η is fitted, and what it leaves unexplained is part of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.auditing.analysis.distributions import count_cases, find_cases, mean
from gradent.record.table import Floats, Table

__all__ = ["FEWEST_POINTS", "dynamics", "logged_onset", "measured_curve", "measured_fall", "smooth"]

SAME_REFERENCE = 1e-3
"""How far, of its size, a reference's mean log-prob may differ between checkpoints and still be the same reference."""

CLEARLY_BELOW = 3
"""Standard errors by which a mean lies clearly below the best checkpoint's, which is the highest of several."""

FEWEST_POINTS = 12
"""Logged points below which a curve says nothing."""

CHOSEN, REJECTED = "logps/chosen", "logps/rejected"
_LOGPS = ("chosen_logp", "rejected_logp")
_REFERENCES = ("ref_chosen_logp", "ref_rejected_logp")
_CHANGES = ("chosen_change", "rejected_change")

Curves = Mapping[str, Sequence[Sequence[Any]]]
Points = Sequence[tuple[int, Mapping[int, Floats]]]  # a step, and the two log-probs, [2], of each pair there


def dynamics(columns: Mapping[str, Any], curves: Curves) -> dict[str, Any] | None:
    """What happened to the log-probs over a run; None for one checkpoint without curves of log-probs in the log."""
    table = Table.read(columns)
    checkpoints = {int(step): table.select(table["step"] == step) for step in np.unique(table["step"])}
    start = _read_start(checkpoints)
    logged, keys = logged_onset(curves)
    if len(checkpoints) < 2 and not keys:
        return None
    intervals = [_fit(begin, end, checkpoints) for begin, end in pairwise(checkpoints)]
    points = [
        (step, dict(zip(table["pair"].tolist(), _matrix(table, _LOGPS), strict=True)))
        for step, table in checkpoints.items()
    ]
    if start is not None and 0 not in checkpoints:
        points.insert(0, (0, start))
    fall = measured_fall(points)
    return {
        # Steps since which both log-probs fall: on the pairs, and on the trainer's curves (None: they do not).
        "onset": {"measured": None if fall is None else fall["from"], "logged": logged, "logged_keys": keys},
        "fall": fall,  # of both, since the best checkpoint so far
        "curve": measured_curve(points),  # changes since the first point, which is step 0 where that is known
        # Mean log-probs of step 0; None where there is no one fixed reference.
        "start": start and dict(zip(_LOGPS, np.mean(list(start.values()), axis=0).tolist(), strict=True)),
        "intervals": intervals,  # between successive checkpoints, over the pairs of both
        **_describe_whole(checkpoints, intervals),
    }


def _read_start(checkpoints: Mapping[int, Table]) -> dict[int, Floats] | None:
    """Pair -> the reference's two log-probs, `[2]`, if there is one reference for all checkpoints."""
    start: dict[int, Floats] = {}
    for step, table in checkpoints.items():
        references = _matrix(table, _REFERENCES)
        if not np.isfinite(references).all():
            return None
        # A model that is its own reference says nothing of step 0; at step 0 itself the two are one.
        if step > 0 and np.array_equal(references, _matrix(table, _LOGPS)):
            return None
        reference = dict(zip(table["pair"].tolist(), references, strict=True))
        shared = [pair for pair in reference if pair in start]
        difference = sum(np.abs(reference[pair] - start[pair]).sum() for pair in shared)
        if difference > SAME_REFERENCE * sum(1 + np.abs(start[pair]).sum() for pair in shared):
            return None
        start = {**reference, **start}
    return start or None


def _fit(begin: int, end: int, checkpoints: Mapping[int, Table]) -> dict[str, Any]:
    """Changes over one interval beside η times the predictions at its begin, with the η >= 0 of least squares."""
    first, last = _common(checkpoints[begin], checkpoints[end])
    change, predicted = _matrix(last, _LOGPS) - _matrix(first, _LOGPS), _matrix(first, _CHANGES)
    squares = float((predicted**2).sum())
    size = max(0.0, float((change * predicted).sum()) / squares) if squares > 0 else None
    figures = _compare(change, predicted * (size or 0.0), size, predicted)
    if figures["explained"] is not None:
        figures["explained"] = max(0.0, figures["explained"])  # a fit is below 0 by rounding alone
    return {"from": begin, "to": end, **figures}


def _describe_whole(checkpoints: Mapping[int, Table], intervals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same from the first checkpoint to the last, over the pairs of all; nothing is fitted anew."""
    if not intervals:
        return {"whole": None, "cases_realised": None}
    tables = dict(zip(checkpoints, _common(*checkpoints.values()), strict=True))
    first, last = intervals[0]["from"], intervals[-1]["to"]
    change = _matrix(tables[last], _LOGPS) - _matrix(tables[first], _LOGPS)
    predicted = np.zeros_like(change)
    for interval in intervals:
        predicted += (interval["step_size"] or 0.0) * _matrix(tables[interval["from"]], _CHANGES)
    sizes = [interval["step_size"] for interval in intervals if interval["step_size"] is not None]
    total = _compare(change, predicted, sum(sizes) if sizes else None, predicted)
    shares = count_cases(find_cases(change)) if len(change) else None
    return {"whole": {"from": first, "to": last, **total}, "cases_realised": shares}


def _matrix(table: Table, names: Sequence[str]) -> Floats:
    """Two columns side by side, `[pairs, 2]`."""
    return np.stack([table[name] for name in names], axis=1)


def _common(*tables: Table) -> list[Table]:
    """The rows of the pairs that all tables hold, by pair."""
    pairs = reduce(np.intersect1d, [table["pair"] for table in tables])
    return [table.select(np.argsort(table["pair"])).select(np.isin(np.sort(table["pair"]), pairs)) for table in tables]


def _compare(change: Floats, predicted: Floats, size: float | None, direction: Floats) -> dict[str, Any]:
    """Realised beside predicted changes, `[pairs, 2]` each; `_sign` is the share of changes with `direction`'s sign."""
    figures: dict[str, Any] = {"pairs": len(change)}
    for column, side in enumerate(("chosen", "rejected")):
        signed = direction[:, column] != 0
        agree = np.sign(change[signed, column]) == np.sign(direction[signed, column])
        figures[f"{side}_change"] = mean(change[:, column])
        figures[f"{side}_predicted"] = mean(predicted[:, column])
        figures[f"{side}_sign"] = mean(agree.astype(np.float64))
        figures[f"{side}_signed"] = int(signed.sum()) or None
    total = float((change**2).sum())
    explained = 1 - float(((change - predicted) ** 2).sum()) / total if total > 0 else None
    return {**figures, "step_size": size, "explained": explained}


def measured_curve(points: Points) -> list[dict[str, Any]]:
    """Change of both mean log-probs since the first point, with its standard error over the pairs of both points."""
    curve = []
    for step, logps in points:
        shared = [pair for pair in points[0][1] if pair in logps]
        change = np.array([logps[pair] - points[0][1][pair] for pair in shared]).reshape(-1, 2)
        curve.append({"step": step, "pairs": len(shared), **_describe_change(change)})
    return curve


def measured_fall(points: Points) -> dict[str, Any] | None:
    """The fall of both mean log-probs since the best checkpoint so far; None where they do not both lie below it."""
    # A run whose log-probs rise first and fall then is told from where they fall, not from where it has lost all that
    # it gained. Checkpoints at which they have not both clearly fallen yet are no part of the fall.
    shared = [pair for pair in points[0][1] if all(pair in values for _, values in points)] if points else []
    if len(points) < 2 or len(shared) < 2:
        return None
    logps = np.array([[values[pair] for pair in shared] for _, values in points])  # [points, pairs, 2]
    begin = best = int(logps.mean(axis=1).argmax(axis=0).max())
    if not _both_fell(logps[-1] - logps[best]):
        return None
    while not _both_fell(logps[begin + 1] - logps[best]):
        begin += 1
    change = logps[-1] - logps[begin]
    if not _both_fell(change):
        return None
    both = float((change < 0).all(axis=1).mean())
    return {
        "from": points[begin][0], "to": points[-1][0], "pairs": len(shared), **_describe_change(change), "both": both,
    }  # fmt: skip


def _both_fell(change: Floats) -> bool:
    """Whether the mean of either column, `[pairs, 2]`, is below 0 by more than its standard errors."""
    error = change.std(axis=0, ddof=1) / math.sqrt(len(change))
    return bool((change.mean(axis=0) + CLEARLY_BELOW * error < 0).all())


def _describe_change(change: Floats) -> dict[str, float | None]:
    """Mean and standard error of both columns, `[pairs, 2]`."""
    figures: dict[str, float | None] = {}
    for column, side in enumerate(("chosen", "rejected")):
        values = change[:, column]
        figures[side] = mean(values)
        figures[f"{side}_error"] = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return figures


def logged_onset(curves: Mapping[str, Sequence[Sequence[Any]]]) -> tuple[int | None, list[str]]:
    """The logged step since which both curves of log-probs fall, to their end, and the keys of the two."""
    # Curves of an evaluation set come first: its points are all of the same pairs. A fall is from the highest running
    # median of w points, by more than three times the noise of the difference of two such medians, √2·1.2533/√w times
    # that of a point, i.e. 1.4826/√2 times the median difference of neighbours, which a trend hardly touches.
    prefixes = [key.removesuffix(CHOSEN) for key in curves if key.endswith(CHOSEN)]
    candidates = [[prefix + CHOSEN, prefix + REJECTED] for prefix in prefixes if prefix + REJECTED in curves]
    for keys in sorted(candidates, key=lambda keys: (not keys[0].startswith("eval"), -len(curves[keys[0]]))):
        chosen, rejected = (
            {int(step): float(value) for step, value in curves[key] if value is not None and math.isfinite(value)}
            for key in keys
        )
        steps = sorted(chosen.keys() & rejected.keys())
        if len(steps) < FEWEST_POINTS:
            continue
        below = np.ones(len(steps), dtype=bool)
        for curve in (chosen, rejected):
            below &= _is_below(np.array([curve[step] for step in steps]))
        above = np.flatnonzero(~below)  # holds the highest point of either curve
        last = int(above[-1])
        return (steps[last] if last < len(steps) - 1 else None), keys
    return None, []


def smooth(values: Floats, width: int) -> Floats:
    """The running median of `width` points about each of `[n]`, shifted inwards near the ends."""
    windows = np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)
    at = np.clip(np.arange(len(values)) - width // 2, 0, len(windows) - 1)
    return np.asarray(windows[at], dtype=np.float64)


def _is_below(values: Floats) -> NDArray[np.bool_]:
    """Which points of a curve, `[n]`, lie clearly below its highest one."""
    width = max(5, len(values) // 10 | 1)
    smoothed = smooth(values, width)
    noise = 1.4826 / math.sqrt(2) * float(np.median(np.abs(np.diff(values))))
    clearly = CLEARLY_BELOW * math.sqrt(2) * 1.2533 / math.sqrt(width) * noise
    return np.asarray(smoothed < smoothed.max() - clearly)
