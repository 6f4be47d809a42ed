"""From a list of rows to micro-batches, batched where the model allows it: the outer loop of the hooks engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradent.errors import ModelError
from gradent.hooks.passes.autograd_engine import is_plain, plain_rows, run_plainly
from gradent.hooks.passes.hooks_engine import NeedsSingleRows, run
from gradent.hooks.passes.microbatch import MicroBatch, Outcome, Row, group_rows, micro_batches
from gradent.hooks.reduction.ledger import Ledger
from gradent.kernels.common.wanted import Wanted
from gradent.model.facts import (
    Batching,
    announce_untrimmed,
    computing_dtypes,
    facts,
    longest_input,
    require_causal,
    tolerance,
    trims,
)
from gradent.model.observed import observed
from gradent.notices import warn

__all__ = ["RowsOutcome", "announce_single_rows", "measure_groups"]

RowsOutcome = tuple[list[int], Outcome]
"""Numbers of a micro-batch's rows, and what came out."""


def measure_groups(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    make_ledger: Callable[[Wanted], Ledger],
    *,
    explicit_budget: int | None,
    dropout: bool,
) -> list[RowsOutcome]:
    """Measure all products among the rows of each group, a micro-batch of whole groups at a time.

    The first two rows that a model is measured on are measured twice: one row a forward, all its logits formed (which
    needs no assumption about the model), and in one padded forward, prompts' logits left out if the model offers that.
    Only where the two agree are rows batched from then on. `names` are the rows' names in an error. Raises
    NotCausalError where a later token changes an earlier prediction, and NonFiniteError for a log-prob.
    """
    device, scratch = rows[0][0].device, make_ledger(Wanted.pairs(1)).budget
    tensors = list(parameters.values())
    few = plain_rows(model, tensors, device, scratch)

    def run_micro(micro: MicroBatch) -> Outcome:
        ledger = make_ledger(micro.wanted)
        if is_plain(micro.forwards, few):
            return run_plainly(model, tensors, micro, ledger)
        return run(model, tensors, micro, ledger, explicit_budget=explicit_budget)

    def micro_of(members: Sequence[Sequence[int]]) -> tuple[list[int], MicroBatch]:
        """Whole groups, row s of each before row s + 1 where they are equal; one row a forward."""
        wanted = Wanted.sizes([len(group) for group in members])
        numbers = [0] * wanted.rows
        for places, group in zip(wanted.groups, members, strict=True):
            for place, row in zip(places, group, strict=True):
                numbers[place] = row
        singles = [[place] for place in range(len(numbers))]
        return numbers, MicroBatch([rows[n] for n in numbers], singles, wanted, [names[n] for n in numbers])

    known = facts(model)
    outcomes: list[RowsOutcome] = []
    batches = micro_batches([[len(rows[row][0]) for row in group] for group in groups], device)
    if known.batching is None:
        first = batches[0][0]
        probe = [*groups[first], *(row for row in range(len(rows)) if row not in groups[first])][:2]
        with observed(model):  # in eval mode: dropout would make two looks at one pair differ
            require_causal(model, rows[probe[0]][0])
            numbers, alone = micro_of([probe])
            outcome = run_micro(alone)
            if len(probe) == 2:
                known.batching = _find_batching(model, list(parameters), alone, outcome, run_micro)
        # If rows share forwards it is measured again, so that every call gives the same bits.
        if not dropout and list(groups[first]) == probe and not (known.batching and known.batching.is_shared):
            outcomes.append((numbers, outcome))
            batches[0].remove(first)
    for batch in filter(None, batches):
        if known.batching and known.batching.is_shared:
            numbers, micro = micro_of([groups[number] for number in batch])
            forwards = group_rows([len(ids) for ids, _ in micro.rows], device, few=few)
            try:
                micro = replace(micro, forwards=forwards, trim=known.batching.trim)
                outcomes.append((numbers, run_micro(micro)))
                continue
            except NeedsSingleRows as need:  # the model changed since it was tried (another attention, say)
                known.batching = Batching(is_shared=False)
                announce_single_rows(need, list(parameters))
        for number in batch:
            numbers, micro = micro_of([groups[number]])
            outcomes.append((numbers, run_micro(micro)))
    return outcomes


def _find_batching(
    model: nn.Module,
    names: Sequence[str],
    pair: MicroBatch,
    single: Outcome,
    run_micro: Callable[[MicroBatch], Outcome],
) -> Batching:
    """Which padded forwards of two rows agree with two forwards of one row; announced where none does."""
    # Padded until its length differs from its number of rows: one axis cannot pass for the other.
    longest = max(len(ids) for ids, _ in pair.rows)
    room = longest_input(model)
    both = replace(pair, forwards=[[0, 1]], least_length=longest + 3 if longest + 3 <= room else 0)
    limit = tolerance("batched rows", computing_dtypes(model, pair.rows[0][0].device))
    # This pair's prompts may be too short to tell; what is seen here is that gradients follow.
    reason = ""
    if trims(model, pair.rows[0][0]):
        try:
            if _difference(single, run_micro(replace(both, trim=True))) <= limit:
                return Batching(is_shared=True, trim=True)
            reason = "they lead to other gradients"
        except NeedsSingleRows:
            reason = "no rule can tell the rows of a batched forward apart"
        except (ModelError, TypeError, ValueError, IndexError, RuntimeError) as raised:
            reason = f"{type(raised).__name__}: {raised}"
    try:
        error = _difference(single, run_micro(both))
    except NeedsSingleRows as need:
        announce_single_rows(need, names)
        return Batching(is_shared=False)
    if error > limit:
        _announce(f"a batched forward of two rows differs from two forwards of one row by {error:.1e} (scaled)")
    elif error <= limit and reason:
        announce_untrimmed(model, reason)
    return Batching(is_shared=error <= limit)


def _difference(single: Outcome, both: Outcome) -> float:
    """How far two outcomes of one pair lie apart, scaled by its norms."""
    totals = [torch.stack([entry.cpu()[:3] for entry in outcome.entries.values()]).sum(0) for outcome in (single, both)]
    norms = totals[0][:2].clamp_min(1e-300).sqrt()
    return float(((totals[0] - totals[1]).abs() / torch.stack((*norms.square(), norms.prod()))).max())


def announce_single_rows(need: NeedsSingleRows, names: Sequence[str]) -> None:
    """Say that rows go through the model one by one, and because of which parameters."""
    listed = ", ".join(names[number] for number in sorted(need.params)[:4])
    more = f" and {len(need.params) - 4} more" if len(need.params) > 4 else ""
    _announce(f"no rule can tell the rows of a batched forward apart where it uses {listed}{more}")


def _announce(reason: str) -> None:
    warn(f"gradent measures this model one row a forward (as exact, but not batched): {reason}.", stacklevel=6)
