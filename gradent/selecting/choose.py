"""Which pairs go: by the ranks of a score, by a threshold, alike in every stratum; no chance but a seed's is in it.

Letters: P scanned pairs, harm a score turned so that more is worse.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradent.errors import InputError
from gradent.record.table import Floats, Table, ranks
from gradent.scanning.rungs import RUNGS, find_rung

__all__ = ["Choice", "choose", "read_share", "score_of"]

RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What becomes of each pair, `[P]` each."""

    keep: NDArray[np.bool_]
    weights: Floats  # what a step gives each pair, as a multiple of what it gave; 0 where it goes
    reasons: list[str]  # why a pair goes; empty where it stays


def score_of(table: Table, by: str, seed: int) -> tuple[Floats, int, str]:
    """A score `[P]`, +1 where more of it is worse and -1 where less is, and it in words; refuses an unknown one."""
    if by == RANDOM:
        values = np.random.default_rng(seed).permutation(table.rows).astype(np.float64)
        return values, 1, "a random number"
    rung = find_rung(by)
    if rung is None:
        names = ", ".join([*(each.name for each in RUNGS), RANDOM])
        raise InputError(f"by is {by!r}; accepted: {names} (command line: --by).")
    values = np.asarray(rung.read(table), dtype=np.float64)
    unknown = int((~np.isfinite(values)).sum())
    exact = rung.parts in {("exact",), ("sample",)}
    # A pair whose gradient is zero has no cosine, measured or not.
    unmeasured = int((~table["is_exact"]).sum()) if exact else unknown
    if unmeasured == table.rows or (unmeasured and exact):
        remedy = {
            "head": "Scan again without --no-head", "head_change": "Scan again without --no-head",
            "reward_margin": "Scan again with --reference, or with an adapter",
        }.get(by, "Scan again with --exact all (what is scanned already is not scanned again)")  # fmt: skip
        raise InputError(
            f"by is {by!r}, and {unmeasured} of {table.rows} scanned pairs have none. {remedy}, or choose by a score "
            "that every pair has."
        )
    return values, rung.worse, rung.label


def read_share(text: str, name: str) -> float:
    """A share of 1 from "10%" or "0.1"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
    value = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0 < value < 1:
        raise InputError(f"{name} is {text!r}; accepted: a share such as 10% or 0.1 (command line: --{name}).")
    return value


def choose(
    harm: Floats, score: Floats, label: str, strata: Sequence[str] | None, *, drop: float | None, worst: float | None,
    weigh: bool,
) -> Choice:  # fmt: skip
    """What becomes of the pairs: the share `drop` of every stratum goes, or what is worse than `worst`; or weights."""
    count = len(harm)
    names = np.array(["" if strata is None else stratum for stratum in (strata or [""] * count)], dtype=object)
    keep, weights, reasons = np.ones(count, dtype=bool), np.ones(count), [""] * count
    known = np.isfinite(harm)
    for name in sorted(set(names)):
        inside = np.flatnonzero((names == name) & known)
        # The worst first; of equal ones the later row goes first.
        order = inside[np.lexsort((-inside, -harm[inside]))]
        place = f" of the {len(order)} pairs with {name}" if strata is not None else f" of {len(order)} pairs"
        if weigh:
            weights[inside] = 2 * (1 - (ranks(harm[inside]) - 0.5) / max(1, len(inside)))
            continue
        if drop is not None:
            gone = order[: min(round(drop * len(order)), len(order) - 1)] if len(order) else order
        else:
            assert worst is not None
            gone = order[harm[order] > worst]
        for rank, position in enumerate(gone.tolist(), 1):
            keep[position], weights[position] = False, 0.0
            if drop is not None:
                why = f"among the worst {drop:.4g}{place}"
            else:
                why = f"worse than the threshold {abs(worst or 0.0):.6g}"
            reasons[position] = f"{label} is {score[position]:.6g}: number {rank} from the worst{place}, {why}"
    return Choice(keep=keep, weights=weights, reasons=reasons)
