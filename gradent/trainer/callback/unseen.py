"""Which steps tell what they do to pairs that are not in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from gradent.attribution.likelihood import estimate_nll
from gradent.attribution.unseen import estimate_unseen
from gradent.pairs.batch import PairBatch
from gradent.trainer.records.step import StepRecord

__all__ = ["UnseenPairs"]

EARLY = 9
"""Steps in which Adam's second moment rests on few gradients; the estimate is off then (docs/account.md)."""


class UnseenPairs:
    """Estimates what steps do to unseen pairs, as long as the batches' pairs are new to the run and to each other."""

    def __init__(self, say_once: Callable[[str], object]) -> None:
        self._say_once = say_once
        self._prompts: set[int] = set()
        self._obstacle: str | None = None

    def judge(self, record: StepRecord, epoch: float | None) -> StepRecord:
        """The record with what its step, begun in this epoch, does to unseen pairs, and what an NLL term would."""
        unseen, account, gram = self.estimate(record, epoch), record.attribution, record.gram
        if account is None or record.batch is None or record.step <= EARLY or record.inactive or not len(gram):
            return replace(record, unseen=unseen)
        nll = estimate_nll(account, record.verdict.d_w, gram.chosen_len)
        if nll is not None and unseen is None:
            nll = nll.without_unseen()
        return replace(record, unseen=unseen, nll=nll)

    def estimate(self, record: StepRecord, epoch: float | None) -> Tensor | None:
        """`estimate_unseen` of a step, begun in this epoch; None where it would not hold, which is said once."""
        if record.batch is None or record.attribution is None:
            return None
        if self._obstacle is None:
            self._obstacle = self._find_obstacle(record.batch, epoch)
        found = estimate_unseen(record.attribution) if record.step > EARLY else None
        if found is None or self._obstacle is None:
            return found
        self._say_once(
            f"gradent/unseen is not given from here on: {self._obstacle}, and what a step does to pairs that are not "
            "in it can no longer be told from those that are (docs/account.md)."
        )
        return None

    def _find_obstacle(self, batch: PairBatch, epoch: float | None) -> str | None:
        """Why the estimate does not hold from this step on; None where it does."""
        rows = [batch.row(pair) for pair in range(len(batch))]
        prompts = [hash(tuple(ids[~marks.bool()].tolist())) for ids, marks in rows]
        has_repeats = len({*prompts}) < len(prompts) or not self._prompts.isdisjoint(prompts)
        self._prompts.update(prompts)
        if has_repeats:
            return "pairs share prompts"
        return "the data comes again, in the second epoch" if (epoch or 0.0) > 1.0 else None
