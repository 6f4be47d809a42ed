"""Which steps tell what they do to pairs that are not in them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gradent.attribution.unseen import estimate_unseen
from gradent.trainer.callback.step import StepRecord

__all__ = ["UnseenPairs"]

EARLY = 9
"""Steps in which Adam's second moment rests on few gradients; the estimate is off then (docs/account.md)."""


class UnseenPairs:
    """Estimates what steps do to unseen pairs, as long as the batches' pairs are new to the run and to each other."""

    def __init__(self, say_once: Callable[[str], object]) -> None:
        self._say_once = say_once
        self._prompts: set[int] = set()
        self._is_over = False

    def estimate(self, record: StepRecord, epoch: float | None) -> Tensor | None:
        """`estimate_unseen` of a step, begun in this epoch; None where it would not hold."""
        if record.batch is None or record.attribution is None or self._is_over:
            return None
        rows = [record.batch.row(pair) for pair in range(len(record.batch))]
        prompts = [hash(tuple(ids[~marks.bool()].tolist())) for ids, marks in rows]
        has_repeats = len({*prompts}) < len(prompts) or not self._prompts.isdisjoint(prompts)
        self._prompts.update(prompts)
        if has_repeats or (epoch or 0.0) > 1.0:
            self._is_over = True
            why = "pairs share prompts" if has_repeats else "the data comes again, in the second epoch"
            self._say_once(
                f"gradent/unseen ends here: {why}, and what a step does to pairs that are not in it can no longer be "
                "told from those that are (docs/account.md)."
            )
            return None
        return estimate_unseen(record.attribution) if record.step > EARLY else None
