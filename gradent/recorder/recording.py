"""What a harvest found: `Recording` of pairs, `RowRecording` of rows that are no pairs.

Letters: k pairs, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from gradent.attribution.across import join_ranks
from gradent.attribution.step import StepAttribution
from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch
from gradent.pairs.row_batch import RowBatch
from gradent.row_gram import RowGram
from gradent.theory.conditions import Verdict

__all__ = ["Recording", "RowRecording", "join_recordings", "join_row_recordings"]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What one harvest found of pairs.

    Attributes:
        gram: Gram entries of the k pairs with a gradient. For a reward model they are those of the reward, and
            `chosen_logp`, `rejected_logp` are rewards.
        d_w: the trainer's own weight of each pair's chosen response, for a loss that is a mean over its pairs, `[k]`;
            the mean of its tokens' weights where they differ.
        d_l: the same for rejected.
        source: "piggyback" (read off the trainer's backward) or "measure" (a pass of gradent's own).
        batch: the tokens of the k pairs, in the gram's order; None for a reward model.
        inactive: pairs that the loss does not move, counted, not averaged; where no pass of gradent's own can be made,
            also those of which it moves one side alone.
        unpaired: rows that found no partner.
        overhead_s: wall time that gradent took, in seconds.
        attribution: what moved each of these responses in the step that follows; None without an optimizer, or where
            its step has no such account (said once in the log).
        changes: what plain gradient descent on each pair's own loss does to chosen and rejected, nats per unit of
            learning rate, float64 `[2, k]`, where the loss weighs the tokens of a response differently; else None, and
            `d_w` and `d_l` say it.
        further: names of the model's inputs beside the tokens (pixels, positions of one's own), which a pass of
            gradent's own cannot give it.
    """

    gram: PairGram
    d_w: Tensor
    d_l: Tensor
    source: Literal["piggyback", "measure"]
    batch: PairBatch | None
    inactive: int
    unpaired: int
    overhead_s: float = 0.0
    attribution: StepAttribution | None = None
    changes: Tensor | None = None
    further: tuple[str, ...] = ()

    @cached_property
    def verdict(self) -> Verdict:
        """What a step on each pair's own loss does to its two log-probs: by `d_w` and `d_l`, or by `changes`."""
        if self.changes is None:
            return Verdict.from_weights(self.gram, self.d_w, self.d_l)
        return Verdict.from_changes(self.gram, self.d_w, self.d_l, *self.changes)


@dataclass(frozen=True, kw_only=True)
class RowRecording:
    """What one harvest found of rows that are no pairs.

    Attributes:
        rows: of the N rows with a gradient: products, log-probs, groups, weights and what moved them.
        source: "piggyback" (read off the trainer's backward) or "measure" (a pass of gradent's own).
        batch: the tokens of the N rows, in their order; None for none.
        inactive: rows that the loss does not move: counted, not averaged.
        groups: groups with a row that the loss moves.
        flat_groups: groups that the loss does not move at all, such as those whose rollouts all have one reward.
        overhead_s: wall time that gradent took, in seconds.
        attribution: what moved each of these rows in the step that follows; None as in `Recording`.
        further: as in `Recording`.
    """

    rows: RowGram
    source: Literal["piggyback", "measure"]
    batch: RowBatch | None
    inactive: int
    labels: Tensor  # of the groups of the N rows, the same on every rank: int64 [N]
    inactive_labels: Tensor  # and of the rows that the loss does not move
    overhead_s: float = 0.0
    attribution: StepAttribution | None = None
    further: tuple[str, ...] = ()

    @property
    def groups(self) -> int:
        """Groups with a row that the loss moves."""
        return len(set(self.labels.tolist()))

    @property
    def flat_groups(self) -> int:
        """Groups that the loss does not move at all."""
        return len(set(self.inactive_labels.tolist()) - set(self.labels.tolist()))


def join_recordings(recordings: Sequence[Recording], *, scale: float = 1.0) -> Recording:
    """Recordings of one step (its micro-batches, its ranks; at least one) as one, with `d_w` and `d_l` scaled."""
    if len(recordings) == 1 and scale == 1.0:
        return recordings[0]
    d_w, d_l = (torch.cat([getattr(part, name) for part in recordings]) * scale for name in ("d_w", "d_l"))
    batches = [part.batch for part in recordings if part.batch is not None]
    changes: Tensor | None = None
    if any(part.changes is not None for part in recordings):
        verdicts = [part.verdict for part in recordings]
        changes = torch.cat([torch.stack([each.chosen_change, each.rejected_change]) for each in verdicts], 1) * scale
    return Recording(
        gram=PairGram.join([part.gram for part in recordings]), d_w=d_w, d_l=d_l, changes=changes,
        source="measure" if any(part.source == "measure" for part in recordings) else "piggyback",
        batch=PairBatch.join(batches) if batches else None, inactive=sum(part.inactive for part in recordings),
        unpaired=sum(part.unpaired for part in recordings), overhead_s=sum(part.overhead_s for part in recordings),
        attribution=_join_accounts(recordings), further=_join_further(recordings),
    )  # fmt: skip


def join_row_recordings(recordings: Sequence[RowRecording], *, scale: float = 1.0) -> RowRecording:
    """Recordings of one step (its micro-batches, its ranks; at least one) as one, with the rows' weights scaled."""
    grams = [part.rows for part in recordings]
    labels = torch.cat([part.labels for part in recordings])
    count = len(labels)
    products = torch.full((count, count), float("nan"), dtype=torch.float64)
    start = 0
    for gram in grams:
        stop = start + len(gram)
        products[start:stop, start:stop] = gram.products
        start = stop
    weights = [gram.weight for gram in grams if gram.weight is not None]
    batches = [part.batch for part in recordings if part.batch is not None]
    rows = replace(
        grams[0], products=products, logp=torch.cat([gram.logp for gram in grams]), group=number_groups(labels),
        length=torch.cat([gram.length for gram in grams]), weight=torch.cat(weights) * scale, modules=None,
    )  # fmt: skip
    joined = RowRecording(
        rows=rows, source="measure" if any(part.source == "measure" for part in recordings) else "piggyback",
        batch=RowBatch.join(batches, rows.group) if batches else None, labels=labels,
        inactive=sum(part.inactive for part in recordings),
        inactive_labels=torch.cat([part.inactive_labels for part in recordings]),
        overhead_s=sum(part.overhead_s for part in recordings), further=_join_further(recordings),
    )  # fmt: skip
    return with_account(joined, _join_accounts(recordings))


def with_account(recording: RowRecording, account: StepAttribution | None) -> RowRecording:
    """The recording with the account of its rows, whose products it takes where they are known there alone."""
    if account is None:
        return replace(recording, attribution=None, rows=replace(recording.rows, moved=None))
    rows = replace(recording.rows, moved=account.moved)
    if account.gram is not None:
        rows = replace(rows, products=torch.where(rows.products.isnan(), account.gram, rows.products))
    return replace(recording, rows=rows, attribution=account)


def number_groups(labels: Tensor) -> Tensor:
    """Groups `[N]` numbered from 0 on as they appear, from their labels."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels.tolist()], dtype=torch.int64)


def _join_further(recordings: Sequence[Recording | RowRecording]) -> tuple[str, ...]:
    return tuple(sorted({name for part in recordings for name in part.further}))


def _join_accounts(recordings: Sequence[Recording | RowRecording]) -> StepAttribution | None:
    accounts = [part.attribution for part in recordings if part.attribution is not None]
    return join_ranks(accounts) if len(accounts) == len(recordings) else None
