"""The learning-rate rule, and the masked trainer's fair chance: both on a seed of their own, which is not reported.

Losses of different scale cannot be compared at one learning rate: CPO's likelihood term moves the model where SimPO's
normalised margin hardly does. Every method is therefore given the rate at which it ends with the same gain of the
held-out margin `log π(chosen) - log π(rejected)`, which is what all of these losses are for: DPO's, at a rate that is
given. What is compared is then where that margin came from, and what it cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import product

__all__ = ["MOVES", "choose_masks", "choose_rate", "distance"]

FACTOR = 2.0
MOVES = 9
"""Rates that are tried at most."""


def distance(gain: float, wanted: float) -> float:
    """How far a gain of the margin is from the wanted one.

    Args:
        gain: nats.
        wanted: nats.

    Returns:
        `|log(gain / wanted)|`; inf where one of them is not above 0.
    """
    return abs(math.log(gain / wanted)) if gain > 0 and wanted > 0 else math.inf


def choose_rate(
    gain_at: Callable[[float], float], start: float, wanted: float, *, moves: int = MOVES
) -> tuple[float, dict[float, float]]:
    """Walk a grid of rates, a factor of 2 apart, until the gain passes the wanted one, and take the nearest.

    Args:
        gain_at: the gain of the margin of a run at a rate; nan or inf where a run broke down.
        start: the first rate.
        wanted: nats; where it is not above 0, no rate is near, and the first is taken.
        moves: rates that are tried at most.

    Returns:
        `(rate, gains)`: the rate whose gain is nearest, and the gain of each that was tried.
    """
    gains = {start: gain_at(start)}
    up = gains[start] < wanted
    rate = start
    while len(gains) < moves and math.isfinite(gains[rate]) and (gains[rate] < wanted) is up:
        rate = rate * FACTOR if up else rate / FACTOR
        gains[rate] = gain_at(rate)
    finite = {rate: gain for rate, gain in gains.items() if math.isfinite(gain)}
    return min(finite, key=lambda rate: distance(finite[rate], wanted)), gains


def choose_masks(
    outcome_of: Callable[[Mapping[str, float]], tuple[float, float]], grid: Mapping[str, Iterable[float]], wanted: float
) -> tuple[dict[str, float], list[tuple[dict[str, float], float, float]]]:
    """The mask settings with the largest change of chosen's log-prob for each nat of the margin's gain.

    Settings whose margin gains less than half of the wanted are passed over: masks that are all empty train nothing,
    and chosen then stays where it is.

    Args:
        outcome_of: a setting -> `(change of the log-prob of chosen, gain of the margin)`, nats.
        grid: values by option.
        wanted: nats, the gain of the same run without masks.

    Returns:
        `(setting, tried)`: the best, and all with their outcomes. Where none gains half, the one that gains most.
    """
    tried = []
    for values in product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        tried.append((setting, *outcome_of(setting)))
    able = [each for each in tried if each[2] >= wanted / 2]
    best = max(able, key=lambda each: each[1] / each[2]) if able else max(tried, key=lambda each: each[2])
    return best[0], tried
