"""What a run's records say, in sentences: what steps do to both sides, what moves them, how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradent.report.page.numbers import plural, share_of_pairs, signed_number
from gradent.report.run.records import Floats, RunRecords, Side

__all__ = ["LEAST", "Movement", "describe_finding", "describe_moved", "describe_trust", "find_fall", "movement"]

LEAST = 32
"""Rows of a side below which nothing is found."""

_CLEARLY = 2.0  # standard errors
_LITTLE = 0.5  # share explained below which sources are not to be read
_LEAST_PART = 0.01
_OTHERS = ("others_chosen", "others_rejected", "earlier_batches")
_WORDS = {
    "own": "own gradient", "others": "other pairs", "earlier_batches": "earlier micro-batches",
    "momentum": "momentum", "weight_decay": "weight decay", "positives": "positives of the same group",
    "negatives": "negatives of the same group", "other_groups": "other groups", "step": "the step as a whole",
}  # fmt: skip
_LOOK = {
    "partner": "The two responses of a pair share too much: look at the pairs with the largest cosine.",
    "others": "Other pairs of the batch do it: look for duplicates, or take larger batches.",
    "momentum": "Earlier steps do it: look at the learning rate, its warm-up and β₁.",
    "negatives": "Negatives of the same group do it: see docs/groups.md.",
    "other_groups": "Other groups of the batch do it: look for prompts that are much alike.",
    "weight_decay": "Weight decay does it: look at its coefficient.",
}  # fmt: skip


@dataclass(frozen=True)
class Movement:
    """Mean change of some rows by a step, in nats, and its standard error."""

    mean: float
    error: float
    rows: int

    @property
    def sign(self) -> int:
        """1 or -1 where the mean is clearly not 0, else 0."""
        if self.rows < 2 or not abs(self.mean) > _CLEARLY * self.error:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return signed_number(self.mean) + (f" ± {self.error:.1g}" if math.isfinite(self.error) else "")


def movement(values: Floats) -> Movement:
    """Of the values that are known."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Movement(math.nan, math.nan, 0)
    error = float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Movement(float(known.mean()), error, len(known))


def find_fall(records: RunRecords) -> int | None:
    """The step since which both sides fall: behind the first side's best point so far; None where they do not."""
    side, other = records.sides
    totals, change = {}, side.change
    for step in np.unique(side.steps[np.isfinite(change)]):
        totals[int(step)] = float(np.nanmean(change[side.steps == step]))
    if not totals:
        return None
    steps, summed = list(totals), np.cumsum(list(totals.values()))
    best = int(summed.argmax())
    start = 0 if summed[best] <= 0 else best + 1
    if start >= len(steps):
        return None
    both = [movement(each.since(steps[start]).change) for each in (side, other)]
    is_clear = all(each.sign < 0 and each.rows >= LEAST for each in both)
    return steps[start] if is_clear else None


def describe_finding(records: RunRecords) -> str:
    """The finding in a line."""
    side, other = records.sides
    rows = min(movement(each.change).rows for each in records.sides)
    if rows < LEAST:
        return _describe_cases(records)
    fall = find_fall(records)
    means = [movement((each if fall is None else each.since(fall)).change) for each in records.sides]
    by = f"{side.name} {signed_number(means[0].mean)}, {other.name} {signed_number(means[1].mean)} nats a step"
    if fall is not None:
        return f"Both fall since step {fall:,}: {by}"
    signs = means[0].sign, means[1].sign
    known = {
        (1, -1): "As meant, {} {} and {} {}", (1, 1): "Both rise", (-1, -1): "Both fell, but do not both fall now",
        (-1, 1): "Reversed, {} {} and {} {}",
    }.get(signs)  # fmt: skip
    if known is None:
        still = " and ".join(each.name for each, sign in zip(records.sides, signs, strict=True) if not sign)
        return f"No clear movement of {still}: {by}"
    verb = {1: "rise", -1: "fall"}
    ends = "" if side.name.endswith("s") else "s"
    return f"{known.format(side.name, verb[signs[0]] + ends, other.name, verb[signs[1]] + ends)}: {by}"


def _describe_cases(records: RunRecords) -> str:
    """Where changes are not known: what a step on each pair alone would do."""
    noun = "pair" if records.has_pairs else "row"
    if not records.has_pairs or records.rows < LEAST:
        return (
            f"Too early to tell: {plural(records.rows, noun)} of {plural(len(records.steps), 'step')} measured so far"
        )
    cases = records.column("case")
    share = share_of_pairs(float((cases == 2).mean()), len(cases))
    return f"A small step on each pair alone would lower both in {share} of {plural(records.rows, noun)}"


def describe_moved(records: RunRecords) -> str:
    """What moved both sides, by source, since they fall or in the whole run; empty without an account."""
    fall, sentences = find_fall(records), list[str]()
    for place, side in enumerate(records.sides):
        known = side if fall is None else side.since(fall)
        total = movement(known.total)
        if not total.rows:
            continue
        moved = _mean_sources(known)
        least = _LEAST_PART * max(map(abs, moved.values()))
        other = records.sides[1 - place].name
        parts = [
            f"{_WORDS.get(source, f'{other} partner')} {signed_number(value)}"
            for source, value in sorted(moved.items(), key=lambda item: item[1])
            if value and abs(value) >= least
        ]
        sentences.append(f"{side.name.capitalize()}: {', '.join(parts)}; together {signed_number(total.mean)}.")
    if not sentences:
        return ""
    look = _describe_look(records.sides[0] if fall is None else records.sides[0].since(fall))
    return f"Mean nats a step, to first order. {' '.join(sentences)} {look}".strip()


def _mean_sources(side: Side) -> dict[str, float]:
    """Source to its mean over the rows that have an account; what other pairs do together, as `others`."""
    moved: dict[str, float] = {}
    for source, values in side.moved.items():
        if np.isfinite(values).any():
            name = "others" if source in _OTHERS and "others_chosen" in side.moved else source
            moved[name] = moved.get(name, 0.0) + float(np.nanmean(values))
    return moved


def _describe_look(side: Side) -> str:
    """Where to look when the first side is lowered: at the source that lowers it most."""
    if not movement(side.change).sign < 0:
        return ""
    moved = _mean_sources(side)
    worst = min(moved, key=lambda name: moved[name], default="")
    return _LOOK.get(worst, "") if worst and moved[worst] < 0 else ""


def describe_trust(records: RunRecords) -> tuple[str, bool]:
    """How many rows it rests on, and how much of what really happened the account explains; and whether to warn."""
    noun = "pair" if records.has_pairs else "row"
    sentences = [f"{plural(records.rows, noun)} of {plural(len(records.steps), 'measured step')}."]
    realised = np.concatenate([side.realised for side in records.sides])
    total = np.concatenate([side.total for side in records.sides])
    known = np.isfinite(realised) & np.isfinite(total)
    warns = records.rows < LEAST
    if known.any() and float(np.square(realised[known]).sum()) > 0:
        explained = 1 - float(np.square(realised - total)[known].sum() / np.square(realised[known]).sum())
        warns = warns or explained < _LITTLE
        share = "nothing" if explained <= 0 else f"{math.floor(100 * explained)}%"
        little = ": too little to read the sources. A lower learning rate makes it more" if explained < _LITTLE else ""
        sentences.append(f"The account explains {share} of what the optimizer's steps really did{little}.")
    elif np.isfinite(total).any():
        sentences.append(
            "Changes are the account's, to first order; EntanglementCallback(realised=True) measures what steps really "
            "did, and how much of it the account explains."
        )
    else:
        sentences.append("No step has an account of what moved its rows; the log of the run says why.")
    sentences.append(f"Each {noun} is measured in the step that trains on it, with its own part in the change.")
    return " ".join(sentences), warns
