"""From the records to the paper's findings: which of them show in this run, by numbers measured in it.

A finding is a set of signs: of changes, cosines and their differences, each a mean over the probe pairs. It appears
when every mean has the sign that the finding names by more than two standard errors over the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradent.record.curves import Floats, mean_and_error, read_curves

__all__ = ["Evidence", "Finding", "judge"]

_ERRORS = 2.0
_SUFFIXED = ("short suffix", "long suffix", "prefix+suffix")


@dataclass(frozen=True)
class Evidence:
    """One measured mean."""

    label: str  # what was averaged
    mean: float | None  # over the probe pairs; None where no pair has a value
    error: float | None  # standard error of the mean; None where there are fewer than two values
    wanted: int  # the sign that the finding names, +1 or -1

    @property
    def holds(self) -> bool:
        """Whether the mean has the wanted sign by more than two standard errors."""
        return self.mean is not None and self.error is not None and self.wanted * self.mean > _ERRORS * self.error


@dataclass(frozen=True)
class Finding:
    """One finding of the paper against what was measured."""

    claim: str
    rule: str
    evidence: tuple[Evidence, ...]

    @property
    def appears(self) -> bool:
        """Whether every piece of evidence holds."""
        return all(evidence.holds for evidence in self.evidence)

    def to_record(self) -> dict[str, Any]:
        """The finding as `demo.json` holds it."""
        return {
            "claim": self.claim,
            "rule": self.rule,
            "appears": self.appears,
            "evidence": [{**asdict(evidence), "holds": evidence.holds} for evidence in self.evidence],
        }


def judge(columns: Mapping[str, Sequence[Any]]) -> list[Finding]:
    """Hold the paper's findings against a demo's rows."""
    chosen = {style: curve.change for style, curve in read_curves(columns, "chosen_logp").items()}
    rejected = {style: curve.change for style, curve in read_curves(columns, "rejected_logp").items()}
    cosine = {style: curve.over_steps for style, curve in read_curves(columns, "cosine").items()}
    change, over = "last step minus step 0", "mean over the measured steps"
    return [
        Finding("Chosen log-prob rises for the single token", change, (_weigh("single token", chosen, +1),)),
        Finding(
            "Chosen log-prob falls where the responses share text after the label",
            change,
            tuple(_weigh(style, chosen, -1) for style in _SUFFIXED),
        ),
        Finding(
            "Chosen log-prob falls more for the longer suffix",
            f"{change}; by pair, the difference of the two",
            (_weigh("long suffix", chosen, -1), _compare("long suffix", "short suffix", chosen, -1)),
        ),
        Finding(
            "Gradient cosine is negative for the single token only",
            over,
            (_weigh("single token", cosine, -1), *(_weigh(style, cosine, +1) for style in _SUFFIXED)),
        ),
        Finding(
            "Gradient cosine grows with the suffix",
            f"{over}, differences",
            (_compare("short suffix", "single token", cosine, +1), _compare("long suffix", "short suffix", cosine, +1)),
        ),
        Finding(
            "Rejected log-prob falls in every style",
            change,
            tuple(_weigh(style, rejected, -1) for style in ("single token", *_SUFFIXED)),
        ),
    ]


def _weigh(style: str, values: Mapping[str, Floats], wanted: int) -> Evidence:
    return _evidence(style, values[style], wanted)


def _compare(one: str, other: str, values: Mapping[str, Floats], wanted: int) -> Evidence:
    """By pair, since pair i of both styles is about the same statement."""
    return _evidence(f"{one} − {other}", values[one] - values[other], wanted)


def _evidence(label: str, values: Floats, wanted: int) -> Evidence:
    mean, error = mean_and_error(values)
    return Evidence(label, mean if math.isfinite(mean) else None, error if math.isfinite(error) else None, wanted)
