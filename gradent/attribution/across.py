"""Accounts of several backwards or ranks as one, whose rows meet by their sketches.

What a backward knows exactly stays exact: its own rows' products, and as one number for each row all that was
accumulated before it. Sketches say how that number splits into rows, and what is not in it: later backwards, other
ranks. `earlier_batches` is what they leave of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from gradent.attribution.sketched import StepSketch
from gradent.attribution.step import StepAttribution, attribute_backward
from gradent.attribution.update_rule import UpdateRule
from gradent.hooks.piggyback.observation import BackwardObservation

__all__ = ["attribute_sketched", "join_ranks"]


def attribute_sketched(
    observations: Sequence[BackwardObservation], rule: UpdateRule, *, kept: float, lr: float | None, ranks: int
) -> StepAttribution | str:
    """The account of all backwards of a step on this rank, in order; without sketches where they are of no use."""
    parts, reasons = [], []
    for observation in observations:
        part = attribute_backward(observation, rule, kept=kept, lr=lr)
        if isinstance(part, str):
            return part
        sketch = StepSketch.of(observation, rule, kept=kept, lr=lr, ranks=ranks)
        if isinstance(sketch, str):
            reasons.append(sketch)
        else:
            parts.append(replace(part, sketch=sketch))
    if reasons:
        return reasons[0]
    joined, sketches = _meet(parts, is_ordered=True)
    sketch = StepSketch.join(sketches)
    return replace(
        joined, is_whole=sketch.has_all and ranks == 1, sketch=sketch if ranks > 1 else None,
        sketch_error=_error(sketches),
    )  # fmt: skip


def join_ranks(parts: Sequence[StepAttribution]) -> StepAttribution:
    """The accounts of several ranks, at least one, as one; their rows meet where all of them have sketches."""
    joined, sketches = _meet(parts, is_ordered=False)
    if not sketches:
        return replace(joined, sketch=None)
    is_whole = len(parts) == sketches[0].ranks and all(sketch.has_all for sketch in sketches)
    return replace(joined, is_whole=is_whole, sketch=None, sketch_error=_error(sketches))


def _meet(parts: Sequence[StepAttribution], *, is_ordered: bool) -> tuple[StepAttribution, list[StepSketch]]:
    """Parts as one, and their sketches, none where one lacks them; `is_ordered` if each knows those before as one."""
    joined = StepAttribution.join(parts)
    sketches = [part.sketch for part in parts if part.sketch is not None]
    if len(sketches) < len(parts) or len({sketch.seed for sketch in sketches}) > 1:
        return joined, []
    products, pushes = joined.products.clone(), joined.pushes.clone()
    moved = {source: values.clone() for source, values in joined.moved.items()}
    places = StepAttribution.places(parts)
    for number, (sketch, rows) in enumerate(zip(sketches, places, strict=True)):
        for before, (other, others) in enumerate(zip(sketches, places, strict=True)):
            if number == before:
                continue
            gram, pushed = sketch.meet(other)
            for source, part in sketch.split(pushed, other).items():
                moved[source][rows] += part
            if is_ordered and before < number:
                moved["earlier_batches"][rows] -= pushed.sum(1)
            products[rows[:, None], others], pushes[rows[:, None], others] = gram[:, other.rows], pushed[:, other.rows]
    return replace(joined, products=products, pushes=pushes, moved=moved), sketches


def _error(sketches: Sequence[StepSketch]) -> float | None:
    """Root mean square error of products in the least of the widths; None where nothing is known to compare with."""
    joined = StepSketch.join(sketches)
    return math.sqrt(joined.squared_error / joined.compared) if joined.compared else None
