"""Which scalars trackers are given: those that a person reads, and what else has something to say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

__all__ = ["ShownScalars", "TrackerKey", "with_totals"]

_ALWAYS = frozenset({
    "gradent/moved/chosen/total", "gradent/case/both_down", "gradent/cosine", "gradent/unseen/chosen",
    "gradent/group/positive_moved/total", "gradent/group/positive_lowered", "gradent/group/cosine",
    "gradent/group/top_share",
    # These are there only where they were asked for.
    "gradent/explained", "gradent/chosen_realised", "gradent/rejected_realised", "gradent/probe/cosine",
    "gradent/probe/chosen_logp", "gradent/probe/rejected_logp", "gradent/probe/case/both_down",
})  # fmt: skip
_ASKED_FOR = ("gradent/layer/", "gradent/proxy/")
_WITHOUT_FIGURES = frozenset({
    "gradent/moved/rejected/total", "gradent/moved/chosen/partner", "gradent/moved/chosen/others",
    "gradent/moved/chosen/momentum", "gradent/group/negative_moved/total", "gradent/group/positive_moved/negatives",
    "gradent/group/positive_moved/other_groups", "gradent/group/positive_moved/momentum",
})  # fmt: skip
"""What the bars of a wandb run show by source."""

_LEAST_ERROR = 0.02
_SAYS: dict[str, Callable[[float], bool]] = {
    "gradent/inactive": lambda value: value > 0,
    "gradent/group/without_contrast": lambda value: value > 0,
    "gradent/coverage": lambda value: value < 1,
    "gradent/weight_ratio": lambda value: not math.isclose(value, 1.0, rel_tol=1e-4),
    "gradent/case/reversed": lambda value: value > 0,
    "gradent/sketch_error": lambda value: value > _LEAST_ERROR,
    "gradent/nll_weight/unseen": lambda value: value > 0,
}
"""Scalars that are constant in a healthy run, with when they say something."""

_MOVED = ("gradent/moved/chosen/", "gradent/moved/rejected/")
_GROUP_MOVED = ("gradent/group/positive_moved/", "gradent/group/negative_moved/")
_OTHERS = ("others_chosen", "others_rejected", "earlier_batches")
_SECTION = "train/"


class TrackerKey(str):
    """A name that stays as it is where transformers' loggers put `train/` in front of all that is logged.

    wandb, TensorBoard and trackio make a section of what stands before the first slash, so gradent has its own.
    """

    __slots__ = ()

    def __radd__(self, other: str) -> str:
        plain = str(self)
        return plain if other == _SECTION else other + plain


class ShownScalars:
    """Picks what trackers are given of a run's scalars, all of them with `detail`."""

    def __init__(self, *, detail: bool) -> None:
        self._detail = detail
        self._said: set[str] = set()  # what has said something once is shown from there on

    def choose(self, scalars: Mapping[str, float], *, has_figures: bool) -> dict[str, float]:
        """What is shown of a window's scalars; with figures, without what they show."""
        self._said |= {name for name, value in scalars.items() if name in _SAYS and _SAYS[name](value)}
        names = _ALWAYS | self._said | (frozenset() if has_figures else _WITHOUT_FIGURES)
        return {
            TrackerKey(name): value
            for name, value in scalars.items()
            if self._detail or name in names or name.startswith(_ASKED_FOR)
        }


def with_totals(scalars: Mapping[str, float]) -> dict[str, float]:
    """Scalars with what all sources, and all other pairs, move together beside each side's sources."""
    result = dict(scalars)
    for prefix in (*_MOVED, *_GROUP_MOVED):
        moved = {name.removeprefix(prefix): value for name, value in scalars.items() if name.startswith(prefix)}
        if not moved:
            continue
        if prefix in _MOVED and "own" in moved:
            result[f"{prefix}others"] = sum(moved[source] for source in _OTHERS if source in moved)
        result[f"{prefix}total"] = sum(moved.values())
    return result
