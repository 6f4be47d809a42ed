"""When both log-probs began to fall: on the pairs that an audit measured, and on the curves that a trainer logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST_POINTS", "logged_onset", "measured_onset", "smooth"]

FEWEST_POINTS = 12
"""Logged points below which a curve says nothing."""

CHOSEN, REJECTED = "logps/chosen", "logps/rejected"

Floats = NDArray[np.float64]


def measured_onset(points: Sequence[tuple[int, Mapping[int, Floats]]]) -> int | None:
    """The first step from which on both mean log-probs stay below their start.

    Below means: by more than two standard errors of the mean change, over the pairs measured both there and at the
    start (the changes are paired, so what pairs differ in does not blur them).

    Args:
        points: `(step, {pair: log-probs of chosen and rejected, nats, [2]})`, by step; the first is the start.

    Returns:
        The step, or None: both do not fall, or not to the end, or fewer than two points, or than two pairs.
    """
    onset = None
    for step, logps in reversed(points[1:]):
        shared = [pair for pair in points[0][1] if pair in logps]
        if len(shared) < 2:
            break
        change = np.array([logps[pair] - points[0][1][pair] for pair in shared])
        error = change.std(axis=0, ddof=1) / math.sqrt(len(shared))
        if not (change.mean(axis=0) + 2 * error < 0).all():
            break
        onset = step
    return onset


def logged_onset(curves: Mapping[str, Sequence[Sequence[Any]]]) -> tuple[int | None, list[str]]:
    """The first logged step from which on both curves of log-probs stay below their level at the start.

    The curves are those of an evaluation set if they have twelve points at least (all points are of the same pairs),
    else those of the training batches, likewise. The rule, for each of the two:

    - smoothed: the running median of w points about each point (an odd number near a tenth of them, 5 at least); near
      the ends the w outermost points;
    - level at the start: the median of the first w points;
    - noise of one point: 1.4826/√2 times the median size of the differences of neighbours, which a trend hardly
      touches; of the difference of two medians of w points: √2·1.2533/√w times that;
    - below: the smoothed curve is under the level by more than twice that noise.

    Args:
        curves: `{key: [[step, value], ...]}`; of a step logged twice the later value counts.

    Returns:
        `(step, keys)`: the step, None where the curves do not stay below; the two keys, none where no curves of
        log-probs are long enough.
    """
    for keys in _candidates(curves):
        chosen, rejected = (_read_curve(curves[key]) for key in keys)
        steps = sorted(chosen.keys() & rejected.keys())
        if len(steps) < FEWEST_POINTS:
            continue
        below = np.ones(len(steps), dtype=bool)
        for curve in (chosen, rejected):
            below &= _is_below(np.array([curve[step] for step in steps]))
        above = np.flatnonzero(~below)
        first = int(above[-1]) + 1 if len(above) else 0
        return (steps[first] if first < len(steps) else None), keys
    return None, []


def smooth(values: Floats, width: int) -> Floats:
    """The running median of `width` points about each point, shifted inwards near the ends.

    Args:
        values: float64 `[n]`.
        width: points under the window, odd, at most n.

    Returns:
        float64 `[n]`.
    """
    windows = np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)
    at = np.clip(np.arange(len(values)) - width // 2, 0, len(windows) - 1)
    return np.asarray(windows[at], dtype=np.float64)


def _is_below(values: Floats) -> NDArray[np.bool_]:
    width = max(5, len(values) // 10 | 1)
    smoothed = smooth(values, width)
    noise = 1.4826 / math.sqrt(2) * float(np.median(np.abs(np.diff(values))))
    return np.asarray(smoothed < smoothed[0] - 2 * math.sqrt(2) * 1.2533 / math.sqrt(width) * noise)


def _candidates(curves: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    """Pairs of keys: evaluation sets first, the longest of them first."""
    prefixes = [key.removesuffix(CHOSEN) for key in curves if key.endswith(CHOSEN)]
    both = [[prefix + CHOSEN, prefix + REJECTED] for prefix in prefixes if prefix + REJECTED in curves]
    return sorted(both, key=lambda keys: (not keys[0].startswith("eval"), -len(curves[keys[0]])))


def _read_curve(points: Sequence[Sequence[Any]]) -> dict[int, float]:
    return {int(step): float(value) for step, value in points if value is not None and math.isfinite(value)}
