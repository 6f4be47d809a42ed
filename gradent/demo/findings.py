"""From the records to the paper's findings: which of them show in this run, by numbers measured in it.

A finding is a set of signs: of changes, cosines and their differences, each a mean over the probe pairs. It appears
when every mean has the sign that the finding names by more than two standard errors over the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradent.record.curves import mean_and_error, read_curves
from gradent.record.table import Floats

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
        evidence = [{**asdict(evidence), "holds": evidence.holds} for evidence in self.evidence]
        return {"claim": self.claim, "rule": self.rule, "appears": self.appears, "evidence": evidence}


def judge(columns: Mapping[str, Sequence[Any]]) -> list[Finding]:
    """Hold the paper's findings against a demo's rows."""
    chosen = {style: curve.change for style, curve in read_curves(columns, "chosen_logp").items()}
    rejected = {style: curve.change for style, curve in read_curves(columns, "rejected_logp").items()}
    cosine = {style: curve.over_steps for style, curve in read_curves(columns, "cosine").items()}
    change, over = "last step minus step 0", "mean over the measured steps"
    single, short, long = "single token", "short suffix", "long suffix"
    evidence = {
        ("Chosen log-prob rises for the single token", change): [_weigh(chosen, +1, single)],
        ("Chosen log-prob falls where the responses share text after the label", change): [
            _weigh(chosen, -1, style) for style in _SUFFIXED
        ],
        ("Chosen log-prob falls more for the longer suffix", f"{change}; by pair, the difference of the two"): [
            _weigh(chosen, -1, long), _weigh(chosen, -1, long, short)
        ],
        ("Gradient cosine is negative for the single token only", over): [
            _weigh(cosine, -1, single), *(_weigh(cosine, +1, style) for style in _SUFFIXED)
        ],
        ("Gradient cosine grows with the suffix", f"{over}, differences"): [
            _weigh(cosine, +1, short, single), _weigh(cosine, +1, long, short)
        ],
        ("Rejected log-prob falls in every style", change): [
            _weigh(rejected, -1, style) for style in (single, *_SUFFIXED)
        ],
    }  # fmt: skip
    return [Finding(claim, rule, tuple(weighed)) for (claim, rule), weighed in evidence.items()]


def _weigh(values: Mapping[str, Floats], wanted: int, style: str, than: str = "") -> Evidence:
    """The mean of a style, or by pair of its difference to another: pair i of both is about the same statement."""
    mean, error = mean_and_error(values[style] - values[than] if than else values[style])
    label, is_finite = f"{style} − {than}" if than else style, math.isfinite
    return Evidence(label, mean if is_finite(mean) else None, error if is_finite(error) else None, wanted)
