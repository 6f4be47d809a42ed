"""One backward of a trainer under watch: which row is which, and what its forwards say of them.

Letters: N rows of a backward; of k pairs, rows 0..k-1 are chosen and k..2k-1 rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from gradent.hooks.overhead import Clock, wait_for
from gradent.hooks.piggyback.coefficients import FAINTEST, Coefficients
from gradent.hooks.piggyback.config import StepMetric, WatchConfig
from gradent.hooks.piggyback.forward import WatchedForward
from gradent.hooks.piggyback.gradient_norms import GradientNorms
from gradent.hooks.piggyback.guard import Guard
from gradent.hooks.piggyback.observation import BackwardObservation
from gradent.hooks.piggyback.pairing import Pairing, Row, pair_rows
from gradent.hooks.reduction.account_ledger import AccountLedger, RowLedger
from gradent.hooks.reduction.collector import Collector, Place
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import split_factor
from gradent.hooks.uses.packed_rows import PackedRows
from gradent.kernels.common.account import AccountLayout, ElementMetric
from gradent.kernels.common.numerics import accumulator
from gradent.kernels.common.sketch import GradientSketch, RowSketches
from gradent.kernels.common.wanted import Wanted
from gradent.model.inputs import NO_INPUTS, FurtherInputs
from gradent.pair_gram import on_cpu

__all__ = ["WatchedBackward"]


EARLIER = "earlier_batches"
"""The source that is what a parameter's gradient was before this backward."""


class WatchedBackward:
    """The forwards below one backward: of pairs one, or one of chosen rows and one of rejected rows."""

    def __init__(self, config: WatchConfig, clock: Clock, number: int = 0) -> None:
        self.config = config
        self._number = number
        self.guard = Guard(clock, on_out_of_memory=self._drop_collector)
        self.forwards: list[WatchedForward] = []
        self.observation = BackwardObservation()
        self._places: dict[WatchedForward, Place] = {}
        self._collector: Collector | None = None
        self._grad_versions: list[int] = []
        self._step: StepMetric | None = None
        self._shares: Tensor | None = None  # what turns a row's gradient into its part of the loss's
        self._has_started = self._is_finished = False
        self._is_undecided = False  # whether these are pairs is told when all forwards have been seen

    @property
    def has_started(self) -> bool:
        """Whether the backward has reached an output, or never can."""
        return self._has_started or any(forward.is_read for forward in self.forwards)

    def make_forward(
        self, input_ids: Tensor, attention_mask: Tensor, inputs: FurtherInputs = NO_INPUTS,
        packed: PackedRows | None = None,
    ) -> WatchedForward:  # fmt: skip
        """A forward to watch, of `[N, L]` ids and mask, what it had beside them, and where rows lie that are packed."""
        return WatchedForward(self.config, self.guard, self._on_coefficients, input_ids, attention_mask, inputs, packed)

    def add_forward(self, forward: WatchedForward, output: Any, kwargs: Mapping[str, Any]) -> None:
        """Take in a forward that has ended with an output."""
        self.forwards.append(forward)
        self.guard.guarded(forward.inspect, output, kwargs)

    def abandon(self, reason: str) -> None:
        """Give this backward up before it starts."""
        self._has_started = True
        self.guard.break_off(reason)

    def _on_coefficients(self, forward: WatchedForward, coefficients: Coefficients) -> tuple[Place, Collector] | None:
        """Where a forward's rows belong and what collects their gradients; None where the backward is of no use."""
        guard, observation = self.guard, self.observation
        if not self._has_started:
            self._start(forward, coefficients)
        if guard.unusable_reason is None and not bool(coefficients.c.isfinite().all()):
            guard.break_off("the gradient of the log-probs is not finite")
        if guard.unusable_reason is not None or self._collector is None:
            return None
        if not coefficients.is_constant:
            observation.is_constant = False
            observation.is_of_tokens &= coefficients.is_of_tokens
            again = "each row once more" if self.config.pairing == "rows" else "two rows more a pair"
            verdict = (
                f"verdicts take each token's weight, and {again}"
                if coefficients.is_of_tokens
                else "it has a part besides, that is no log-prob of these tokens, so that verdicts are made with mean "
                "weights and can have the wrong sign"
            )
            guard.fail(
                "the loss weighs the tokens of a response differently (by up to "
                f"{coefficients.spread:.1e} of the mean weight), so that its step is none of whole responses; {verdict}"
            )
        observation.is_reward = coefficients.is_reward
        observation.has_given_marks &= coefficients.has_given_marks
        place = self._places[forward]
        mask, rows = forward.attention_mask.cpu().bool(), _read_rows(forward, coefficients)
        if observation.sides == 1:
            shown = _show_responses(rows, coefficients, mask)
            labels = self.config.grouping.label(forward.input_ids, shown, place.rows[0], self._number)
            observation.group[list(place.rows)] = torch.tensor(labels)
        for row, number in enumerate(place.rows):
            if number >= 0:
                observation.rows[number] = rows[row]
                observation.tokens[number] = coefficients.tokens[row][mask[row]]
                if self._shares is not None:
                    power, _ = split_factor(1 / float(coefficients.c[row]) if coefficients.c[row] else 0.0)
                    self._shares[number] = 1 / power if power else 0.0
                observation.c[number], observation.logps[number] = coefficients.c[row], coefficients.logp[row]
        return place, self._collector

    def _start(self, forward: WatchedForward, coefficients: Coefficients) -> None:
        """The backward has reached the first output: settle which row is which."""
        self._has_started = True
        config, observation = self.config, self.observation
        self._step = None if config.step is None else config.step()
        if self._step is not None or any(forward.has_hidden_regions for forward in self.forwards):
            self._grad_versions = [_grad_version(parameter) for parameter in config.tensors]
        numbers = self._number_rows(forward, coefficients)
        if isinstance(numbers, str):
            self.guard.break_off(numbers)
            return
        numbered = zip(self.forwards, numbers, strict=True)
        self._places = {forward: Place(forward.layout, rows) for forward, rows in numbered}
        observation.unpaired = sum(number < 0 for rows in numbers for number in rows)
        count = sum(number >= 0 for rows in numbers for number in rows)
        observation.c, observation.logps = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
        observation.rows = [(torch.zeros(0), torch.zeros(0))] * count
        observation.tokens = [torch.zeros(0)] * count
        observation.group = torch.arange(max(1, count // observation.sides)).repeat(observation.sides)[:count]
        observation.wanted = Wanted.all(count) if observation.sides == 1 else Wanted.pairs(count // 2)
        self._collector = Collector(self._make_ledger(observation.wanted), config.budget)
        for forward, place in self._places.items():
            for tap in forward.expected:
                self._collector.expect(tap, place)

    def _make_ledger(self, wanted: Wanted) -> Ledger:
        config, step, observation = self.config, self._step, self.observation
        if step is None:
            return Ledger(wanted, budget=config.budget, weight=config.weight)
        observation.norms = GradientNorms(config.tensors, self.guard.clock)
        observation.norms.start()
        size = sum(tensor.numel() * accumulator(tensor.dtype).itemsize for tensor in config.tensors)
        if step.store.reserve(wanted.rows * size):
            return RowLedger(wanted, config.tensors, budget=config.budget)
        has_before = any(version >= 0 for version in self._grad_versions)
        observation.weighted = (*step.weighted, *([EARLIER] if has_before else []))
        observation.plain = tuple(step.plain)
        layout = AccountLayout(wanted.rows, len(observation.weighted), len(observation.plain), wanted)
        self._shares = torch.zeros(wanted.rows, dtype=torch.float64)
        return AccountLedger(
            layout, self._element_metric, self._shares, budget=config.budget,
            sketches=self._make_sketches(wanted.rows, step),
        )  # fmt: skip

    def _make_sketches(self, rows: int, step: StepMetric) -> RowSketches | None:
        """Sketches by which rows meet those of other backwards; None where there are none, or where they do not fit."""
        shapes = [tensor.shape for tensor in self.config.tensors]
        width = step.store.sketch_width(rows, sum(shape.numel() for shape in shapes))
        rates = step.rates() if width else None
        if rates is None:
            return None
        self.observation.rates, self.observation.seed = torch.tensor(rates, dtype=torch.float64), step.seed()
        sketch = GradientSketch(shapes, width, seed=self.observation.seed)
        return RowSketches(sketch, rows, rates, room=self.config.budget // 16)

    def _element_metric(self, number: int) -> ElementMetric:
        """What the optimizer has of a parameter, and the gradient that was there before this backward."""
        tensor, step = self.config.tensors[number], self._step
        assert step is not None
        metric = step.metric(number)
        if EARLIER not in self.observation.weighted:
            return metric
        if _grad_version(tensor) != self._grad_versions[number]:
            self.observation.no_account_reason = "a parameter's gradient was accumulated before its last use was seen"
        return replace(metric, before=tensor.grad, weighted=[*metric.weighted, tensor.grad])

    def _number_rows(self, first: WatchedForward, coefficients: Coefficients) -> list[Sequence[int]] | str:
        """Each forward's rows as numbers among all (-1: in no pair), or why they do not pair up."""
        counts = [forward.layout.rows for forward in self.forwards]
        pairing: str | None = self.config.pairing
        if pairing is None and len(counts) == 1:
            pairing = self.config.evidence.decide(_read_rows(first, coefficients), coefficients.c)
            if pairing not in ("halves", "rows"):
                return pairing
        if pairing in (None, "rows"):
            self.observation.sides, self._is_undecided = 1, pairing is None
            starts = [sum(counts[:place]) for place in range(len(counts))]
            return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
        if len(counts) > 2:
            return f"{len(counts)} forwards preceded the backward"
        if len(counts) == 2:
            if counts[0] != counts[1]:
                return f"two forwards of {counts[0]} and {counts[1]} rows preceded the backward"
            return [range(counts[0]), range(counts[0], 2 * counts[0])]
        order = pair_rows(cast(Pairing, pairing), coefficients.c)
        if isinstance(order, str):
            return order
        numbers = [-1] * counts[0]
        for number, row in enumerate(order):
            numbers[row] = number
        return [numbers]

    def finish(self) -> BackwardObservation:
        """What the backward, which is over, showed; its graph is let go of."""
        guard, observation = self.guard, self.observation
        if self._is_finished:
            return observation
        self._is_finished = True
        if self.has_started and guard.no_entries_reason is None and self._collector is not None:
            for device in {entry.device for entry in self._collector.ledger.entries.values()}:
                wait_for(device)
            guard.guarded(self._gather_entries, self._collector)
        if self.has_started and any(not forward.is_read for forward in self.forwards):
            cause = "" if guard.no_entries_reason is None else f" ({guard.no_entries_reason})"
            guard.break_off(f"the backward did not reach every forward{cause}")
        elif not self.has_started and guard.no_entries_reason is not None:
            guard.break_off(guard.no_entries_reason)  # no coefficients to read, so a backward may have gone unseen
        if self._is_undecided and guard.unusable_reason is None and self.has_started:
            self._decide()
        if len(self.forwards) == 2 and observation.sides == 2 and guard.unusable_reason is None:
            chosen, rejected = observation.c.chunk(2)  # the loss wants the first log-probs up and the second down
            if not bool((chosen <= 0).all() and (rejected >= 0).all()):
                guard.break_off(
                    "two forwards preceded the backward, and they are not the chosen rows and then the rejected rows: "
                    "their weights have other signs"
                )
        observation.is_half = any(forward.is_half for forward in self.forwards)
        if observation.is_half:
            _leave_out_faint(observation)
        observation.further = tuple(sorted({name for each in self.forwards for name in each.inputs.names}))
        observation.no_entries_reason, observation.unusable_reason = guard.no_entries_reason, guard.unusable_reason
        self.close()
        return observation

    def _decide(self) -> None:
        """Say whether the rows of all forwards are pairs, now that all have been read."""
        observation = self.observation
        pairing = self.config.evidence.decide(observation.rows, observation.c)
        if pairing == "halves":
            observation.sides = 2
        elif pairing != "rows":
            self.guard.break_off(pairing)

    def _gather_entries(self, collector: Collector) -> None:
        config, guard, observation = self.config, self.guard, self.observation
        collector.ledger.close()
        leaks = [size for forward in self.forwards for size in forward.padding_gradients]
        if any(float(size) != 0 for size in on_cpu(dict(enumerate(leaks))).values()):
            guard.fail("padding after the responses gets a gradient too, as if the model looked ahead")
        # Entries were measured with powers of two, which round nothing; what is left of each row's factor comes here.
        remainders = torch.zeros(len(observation.c), dtype=torch.float64)
        for forward, place in self._places.items():
            for number, remainder in zip(place.rows, forward.remainders, strict=False):
                if number >= 0:
                    remainders[number] = remainder
        entries, wanted = on_cpu(collector.ledger.entries), collector.ledger.wanted
        if isinstance(collector.ledger, AccountLedger):
            layout = collector.ledger.layout
            if isinstance(collector.ledger, RowLedger):
                observation.rows_kept = {
                    number: rows.mul_(remainders.to(rows).view(-1, *(1,) * (rows.dim() - 1)))
                    for number, rows in collector.ledger.kept.items()
                }
            if collector.ledger.sketches is not None:
                sketches = collector.ledger.sketches.total()
                observation.sketches = sketches * remainders.to(sketches)[:, None]
            observation.account = {number: layout.scaled(entry, remainders) for number, entry in entries.items()}
            observation.entries = {number: blocks["bare"] for number, blocks in observation.account.items()}
        else:
            observation.entries = {number: wanted.scaled(entry, remainders) for number, entry in entries.items()}
        observation.shared = collector.shared
        # Parameters that got a gradient from a hidden region, where no use of them was seen.
        missed = {
            number
            for number, version in enumerate(self._grad_versions)
            if any(forward.has_hidden_regions for forward in self.forwards)
            if number not in observation.entries and _grad_version(config.tensors[number]) != version
        }
        missed |= set(collector.open)
        if missed and config.has_entries:
            guard.fail(f"the backward did not bring all it should for {config.list_names(missed)}")

    def _drop_collector(self) -> None:
        if self._collector is not None:
            self._collector.clear()

    def close(self) -> None:
        """Let go of every graph."""
        for forward in self.forwards:
            forward.close()
        self._drop_collector()


def _leave_out_faint(observation: BackwardObservation) -> None:
    """Take rows for unmoved whose gradients are too small for float16; a pair's two rows together."""
    faint = observation.c.abs() < FAINTEST[torch.float16]
    if observation.sides == 2:
        faint = (faint.view(2, -1).any(0)).repeat(2)
    for row in faint.nonzero()[:, 0].tolist():
        observation.c[row] = 0.0
        observation.tokens[row] = torch.zeros_like(observation.tokens[row])


def _read_rows(forward: WatchedForward, coefficients: Coefficients) -> list[Row]:
    """The rows of a forward without padding."""
    ids, mask = forward.input_ids.cpu(), forward.attention_mask.cpu().bool()
    return [(ids[row][keep], coefficients.marks[row][keep]) for row, keep in enumerate(mask)]


def _show_responses(rows: Sequence[Row], coefficients: Coefficients, mask: Tensor) -> list[Row]:
    """The rows with marks too where the loss moves none of a row's tokens, if the output says where responses start."""
    if coefficients.predicted is None:
        return list(rows)
    inside = torch.arange(mask.shape[1]) >= mask.shape[1] - coefficients.predicted
    return [(ids, marks if marks.any() else inside[keep]) for (ids, marks), keep in zip(rows, mask, strict=True)]


def _grad_version(parameter: Tensor) -> int:
    """A number that changes when a gradient is accumulated: -1 without a gradient, its version with one."""
    return -1 if parameter.grad is None else parameter.grad._version  # noqa: SLF001  (no public name for it)
