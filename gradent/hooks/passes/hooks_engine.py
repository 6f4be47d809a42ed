"""The default engine: a batched forward, one backward pruned of weight gradients, every layer reduced as it arrives.

Letters: N rows of a micro-batch, R rows of one forward, L its padded length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradent.hooks.capture.capture import Capture
from gradent.hooks.capture.coverage import Survey
from gradent.hooks.passes.microbatch import Forward, MicroBatch, Outcome
from gradent.hooks.reduction.collector import Collector, Place
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import Materialized
from gradent.hooks.uses.layout import Layout
from gradent.kernels.common.numerics import accumulator
from gradent.model.calls import forward_logits

__all__ = ["NeedsSingleRows", "run"]


class NeedsSingleRows(Exception):
    """Internal: these parameters (by number) have uses whose rows cannot be told apart in a batched forward."""

    def __init__(self, params: frozenset[int]) -> None:
        super().__init__(params)
        self.params = params


@dataclass
class _Pass:
    """One forward of a group, with its graph."""

    place: Place
    capture: Capture
    logps: Tensor


def run(
    model: nn.Module, parameters: Sequence[Tensor], micro: MicroBatch, ledger: Ledger, *, explicit_budget: int | None
) -> Outcome:
    """Measure one micro-batch of a model, in the mode in which it is to be measured.

    `explicit_budget` is what the materialized gradients of parameters without a rule may take: more such parameters
    than fit are measured in several passes. Raises NeedsSingleRows where a forward has several rows and a
    parameter is used where they cannot be told apart, and NonFiniteError where a log-prob is nan or infinite.
    """
    run_ = _Run(model, parameters, micro, ledger)
    try:
        passes = [run_.forward(members) for members in micro.forwards]
        surveys, explicit = run_.survey(passes)
        batches, uncovered = _fit(parameters, sorted(explicit), len(micro.rows), explicit_budget)
        logps = torch.zeros(len(micro.rows), dtype=torch.float64)
        for forward in passes:
            logps[list(forward.place.rows)] = forward.logps.detach().cpu()
        run_.expect(passes, surveys, explicit)
        while passes:  # the last first
            run_.backward(passes.pop(), surveys.pop().bottoms, batches[0])
        run_.finish(batches[0])
        for batch in batches[1:]:
            run_.again(batch)
        ledger.close()
    finally:
        run_.close()
    return Outcome(ledger.entries, logps, ledger.wanted, uncovered)


class _Run:
    """The steps of `run`, over one model and ledger."""

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], micro: MicroBatch, ledger: Ledger) -> None:
        self.model, self.parameters, self.micro, self.ledger = model, parameters, micro, ledger
        self.budget = ledger.budget
        self.collector = Collector(ledger, ledger.budget)
        self._captures: list[Capture] = []

    def forward(self, members: Sequence[int], *, watch: bool = True) -> _Pass:
        """One recorded forward of some rows."""
        micro = self.micro
        forward = Forward(micro, members)
        rows, length = forward.ids.shape
        place = Place(Layout(rows, length, lambda: [(0, len(micro.rows[row][0])) for row in members]), members)
        # A partial: what a reader (and a profiler) follows leads from the capture to the collector.
        capture = Capture(self.parameters if watch else [], place.layout, partial(self.collector.arrive, place=place))
        self._captures.append(capture)
        with capture:
            logits = forward_logits(self.model, forward.ids, keep=forward.keep)
        return _Pass(place, capture, forward.logps(logits, self.budget))

    def close(self) -> None:
        """Let go of every graph, also of those that an exception left behind."""
        for capture in self._captures:
            capture.close()
        self._captures.clear()
        self.collector.clear()

    def survey(self, passes: Sequence[_Pass]) -> tuple[list[Survey], frozenset[int]]:
        """What the recorded uses account for, and the numbers of the parameters that need explicit gradients."""
        surveys = [one.capture.survey(one.logps) for one in passes]
        explicit = {number for found in surveys for number in found.missed}
        depths: dict[int, set[int]] = defaultdict(set)
        for one in passes:
            for tap in one.capture.taps:
                depths[tap.use.view.param].add(tap.use.depth)
        # A fused weight that is used both whole and expert by expert has overlapping slots.
        explicit |= {number for number, found in depths.items() if len(found) > 1}
        if explicit and any(len(one.place.rows) > 1 for one in passes):
            raise NeedsSingleRows(frozenset(explicit))
        if explicit & depths.keys():  # what lies below those of their uses that were recorded is different without them
            surveys = [one.capture.survey(one.logps, frozenset(explicit)) for one in passes]
        return surveys, frozenset(explicit)

    def expect(self, passes: Sequence[_Pass], surveys: Sequence[Survey], explicit: frozenset[int]) -> None:
        """Wait for the output gradients of all uses that are reached, but those of parameters taken explicitly."""
        self.collector.ignored = explicit
        for one, found in zip(passes, surveys, strict=True):
            for tap in one.capture.taps:
                if tap.node in found.reached and tap.use.view.param not in explicit:
                    self.collector.expect(tap, one.place)

    def again(self, batch: Sequence[int]) -> None:
        """A further pass over every row for the explicit gradients that did not fit into the one before."""
        for members in self.micro.forwards:
            self.backward(self.forward(members, watch=False), [], batch)
        self.finish(batch)

    def finish(self, batch: Sequence[int]) -> None:
        """Reduce parameters whose explicit gradients are all there."""
        for number in batch:
            self.ledger.finish(number)

    def backward(self, one: _Pass, bottoms: Sequence[torch.autograd.graph.GradientEdge], batch: Sequence[int]) -> None:
        """The pruned backward of one forward; explicit gradients of `batch` come out of it too."""
        inputs: list[Any] = [*bottoms, *(self.parameters[number] for number in batch)]
        if not inputs:
            return
        grads = torch.autograd.grad(one.logps.sum(), inputs, allow_unused=True)
        for number, grad in zip(batch, grads[len(bottoms) :], strict=True):
            if grad is not None:
                self.ledger.add(number, one.place.rows[0], (), Materialized(grad))


def _fit(
    parameters: Sequence[Tensor], explicit: Sequence[int], rows: int, budget: int | None
) -> tuple[list[list[int]], dict[int, str]]:
    """Split explicit parameters into passes in which all rows' gradients fit the budget; what never does, and why."""
    batches: list[list[int]] = [[]]
    uncovered: dict[int, str] = {}
    used = 0
    for number in explicit:
        parameter = parameters[number]
        # The gradient of each row, and all once more in the accumulator's dtype while they are reduced.
        size = rows * parameter.numel() * (parameter.element_size() + accumulator(parameter.dtype).itemsize)
        if budget is not None and size > budget:
            uncovered[number] = (
                f"no rule covers a use of it, and its {rows} explicit gradients need {size} bytes: more than "
                f"memory_budget={budget}"
            )
            continue
        if budget is not None and used + size > budget and batches[-1]:
            batches.append([])
            used = 0
        batches[-1].append(number)
        used += size
    return batches, uncovered
