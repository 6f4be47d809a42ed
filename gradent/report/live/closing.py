"""What a run came to, in the one line that closes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from gradent.report.live.alerts import DEFAULT_ALERT

__all__ = ["GroupTally", "PairTally", "Tally"]

_PAIR_CASES = {"ideal": "ideal", "both_down": "both down", "both_up": "both up", "reversed": "reversed"}
_ALWAYS = ("ideal", "both_down")
_SIDES = {"positive": "lowered", "negative": "raised"}


class Tally:
    """Counts of a run's measured steps, and how much of the realised changes their accounts explain."""

    def __init__(self) -> None:
        self.steps = 0
        self._counts: Counter[str] = Counter()
        self._rest = self._realised = 0.0

    def add(self, counts: Mapping[str, int], rest: float = 0.0, realised: float = 0.0) -> None:
        """Count a step: rows by name, and the squares of its realised changes and of what is left unexplained."""
        self.steps += 1
        self._counts.update(counts)
        self._rest, self._realised = self._rest + rest, self._realised + realised

    def describe(self) -> str:
        """What was measured, and what it came to."""
        steps = f"{self.steps:,} measured step{'' if self.steps == 1 else 's'}"
        explained = 1 - self._rest / self._realised if self._realised > 0 else None
        trust = "" if explained is None else f"; the account explains {max(0.0, explained):.0%} of the realised changes"
        if explained is not None and explained < DEFAULT_ALERT.explained:
            trust += ", too little to rest on these shares"
        return f"{steps}, {self._describe_counts()}{trust}"

    def close(self, path: Path | None) -> str:
        """The line for the log; `path` is of the records, if there are any."""
        return f"gradent: {self.describe()}{'' if path is None else f'; records in {path}'}"

    def _describe_counts(self) -> str:
        raise NotImplementedError


class PairTally(Tally):
    """Of pairs, by case, and those that the loss did not move as `inactive`."""

    def _describe_counts(self) -> str:
        pairs = sum(self._counts[case] for case in _PAIR_CASES)
        inactive = self._counts["inactive"]
        idle = f" and {inactive:,} that the loss does not move" if inactive else ""
        named = f"{pairs:,} pair{'' if pairs == 1 else 's'}{idle}"
        if not pairs:
            return named
        shares = [
            f"{_share(self._counts[case], pairs)} {name}"
            for case, name in _PAIR_CASES.items()
            if case in _ALWAYS or self._counts[case]
        ]
        return f"{named}: {', '.join(shares)}"


class GroupTally(Tally):
    """Of rows in groups: `positive`, `negative`, those of them with an account, and those moved against their sign."""

    def _describe_counts(self) -> str:
        rows, groups = (self._counts[name] for name in ("rows", "groups"))
        named = f"{rows:,} row{'' if rows == 1 else 's'} in {groups:,} group{'' if groups == 1 else 's'}"
        shares = [
            f"{_share(self._counts[f'{side} against'], self._counts[side])} of {self._counts[side]:,} {side}s {verb}"
            for side, verb in _SIDES.items()
            if self._counts[side]
        ]
        return f"{named}: {', '.join(shares)}" if shares else named


def _share(part: int, whole: int) -> str:
    """A share in whole percent, halves rounded up; never 0% or 100% of what is neither."""
    share = part / whole
    if 0 < share < 0.005:
        return "under 1%"
    return "over 99%" if 0.995 <= share < 1 else f"{math.floor(100 * share + 0.5)}%"
