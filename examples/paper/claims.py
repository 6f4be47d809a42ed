"""A statement of the paper against numbers, by a rule that code applies.

Every claim is a set of numbers, one a seed, and the sign that each must have; or one error and the bound that it must
be under. It holds when all of them do, and is reported as it is when they do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Claim", "judge_error", "judge_share", "judge_signs", "spread"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the table.

    Attributes:
        where: figure, table, theorem or section of the paper.
        claim: what it says.
        paper: its value or direction.
        rule: when the claim counts as holding.
        ours: what was measured.
        holds: whether it does.
    """

    where: str
    claim: str
    paper: str
    rule: str
    ours: str
    holds: bool

    @property
    def kind(self) -> str:
        """What it is about: "runs" that were trained, "theory" in numbers, or a formula as "printed"."""
        if self.where == "Table 2" or "as printed" in self.claim:
            return "printed"
        return "runs" if self.where.startswith(("Figure", "Table")) else "theory"

    @property
    def verdict(self) -> str:
        """In words."""
        return "holds" if self.holds else "does not hold"


def spread(values: Sequence[float], form: str = "+.3g") -> str:
    """Mean and range.

    Args:
        values: one a seed.
        form: of a number.

    Returns:
        `mean [least, largest]`, or the only value.
    """
    mean = sum(values) / len(values)
    text = f"{mean:{form}}"
    return text if len(values) == 1 else f"{text} [{min(values):{form}}, {max(values):{form}}]"


def judge_signs(
    where: str, claim: str, *, paper: str, rule: str, evidence: Mapping[str, tuple[int, Sequence[float]]]
) -> Claim:
    """Judge by signs.

    Args:
        where: as in `Claim`.
        claim: as in `Claim`.
        paper: as in `Claim`.
        rule: as in `Claim`; "in every seed" is added.
        evidence: label to the wanted sign, +1 or -1, and the values, one a seed.

    Returns:
        The claim; it holds when every value is finite, has the wanted sign and is not zero.
    """
    parts, right = [], True
    for label, (wanted, values) in evidence.items():
        good = sum(math.isfinite(value) and wanted * value > 0 for value in values)
        right = right and bool(values) and good == len(values)
        parts.append(f"{label} {spread(values)} ({good} of {len(values)})")
    return Claim(
        where=where, claim=claim, paper=paper, rule=f"{rule}, in every seed", ours="; ".join(parts), holds=right
    )


def judge_error(where: str, claim: str, *, paper: str, what: str, error: float, bound: float) -> Claim:
    """Judge by an error.

    Args:
        where: as in `Claim`.
        claim: as in `Claim`.
        paper: as in `Claim`.
        what: what the error is of.
        error: the largest that was found.
        bound: what it must be under.

    Returns:
        The claim.
    """
    return Claim(
        where=where, claim=claim, paper=paper, rule=f"{what} under {bound:g}", ours=f"{error:.1e}",
        holds=math.isfinite(error) and error < bound,
    )  # fmt: skip


def judge_share(where: str, claim: str, *, paper: str, what: str, good: int, of: int) -> Claim:
    """Judge by a count: every case must do.

    Args:
        where: as in `Claim`.
        claim: as in `Claim`.
        paper: as in `Claim`.
        what: what is counted.
        good: how many do.
        of: how many there are.

    Returns:
        The claim; it does not hold where there is none.
    """
    return Claim(
        where=where, claim=claim, paper=paper, rule=f"{what}: all", ours=f"{good} of {of}", holds=0 < of == good
    )
