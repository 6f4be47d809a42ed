"""Checkpoint after checkpoint, batch after batch, each finding into the journal: what is there is not done again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gradent.auditing.measuring.batches import Reference, adapter_off, itself, measure_batches, measure_reference
from gradent.auditing.measuring.tokens import measure_pair_tokens, token_cost
from gradent.auditing.state.config import AuditConfig
from gradent.auditing.state.journal import Journal, JournalError
from gradent.auditing.state.targets import AuditPlan, Target
from gradent.distributed import Ranks
from gradent.errors import GradentError
from gradent.loading.preferences import AuditPair
from gradent.loading.prepare import describe_model, open_model
from gradent.loading.source import ModelSource

__all__ = ["Sweep"]

Advance = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The measuring of one audit: every rank makes a sweep, and measures its share of the batches."""

    config: AuditConfig
    plan: AuditPlan
    journal: Journal  # of this rank
    ranks: Ranks
    device: str
    tell: Callable[[str], None]  # takes notes
    failures: dict[str, str]  # target's name -> why it is left out
    token_failures: list[str] = field(default_factory=list)

    def measure_reference(self, advance: Advance) -> None:
        """The log-probs of a reference that is a model of its own, once for all targets."""
        source, identity = self.plan.reference.source, self.plan.reference.identity
        missing = self._missing("reference", identity, self._costs, advance)
        if source is None or not missing:
            return
        model = self._open(source, trainable=False)
        blocks = measure_reference(model, self.plan.pairs, [self.plan.batches[number] for number in missing])
        for number, block in zip(missing, blocks, strict=True):
            self.journal.append("reference", identity, number, block)
            advance(*self._costs[number])

    def measure_targets(self, advance: Advance) -> None:
        """The Gram entries of every pair on every target; of a run, a target that fails is left out."""
        for target in self.plan.targets:
            if target.name in self.failures:
                continue
            try:
                self._measure_target(target, advance)
            except GradentError as error:
                if self.plan.run is None or isinstance(error, JournalError):
                    raise
                self.failures[target.name] = str(error)

    def measure_tokens(self, target: Target, pairs: Sequence[AuditPair], advance: Advance) -> None:
        """The token matrices of some pairs on one target."""
        share = [pairs[number] for number in self.ranks.share(len(pairs))]
        rows = self._missing("tokens", target.identity, {pair.row: (1, token_cost(pair)) for pair in share}, advance)
        missing = [pair for pair in share if pair.row in rows]
        if target.source is None or not missing:
            return
        model = self._open(target.source)
        budget = self.config.memory_budget
        for pair in sorted(missing, key=token_cost, reverse=True):  # what cannot be done fails at once
            columns = measure_pair_tokens(model, self.plan.material.tokenizer, pair, memory_budget=budget)
            self.journal.append("tokens", target.identity, pair.row, columns)
            advance(1, token_cost(pair))

    def _measure_target(self, target: Target, advance: Advance) -> None:
        missing = self._missing("batch", target.identity, self._costs, advance)
        if target.source is None or not missing:
            return
        model = self._open(target.source)
        if self.journal.find("model", target.identity) is None:
            description = describe_model(model, target.source, target.step, self.device)
            self.journal.append("model", target.identity, 0, description)
        blocks = measure_batches(
            model, self.plan.pairs, [self.plan.batches[number] for number in missing],
            reference=self._reference_in_place(model), engine=self.config.engine, by_module=self.config.by_module,
            memory_budget=self.config.memory_budget,
        )  # fmt: skip
        for number, block in zip(missing, blocks, strict=True):
            self.journal.append("batch", target.identity, number, block)
            advance(*self._costs[number])

    def _reference_in_place(self, model: Any) -> Reference | None:
        """The reference where it is the measured model itself, or its base with the adapter off."""
        if self.plan.reference.kind == "adapter_off" and self.plan.reference.source is None:
            return adapter_off(model)
        # Of a single model its own log-probs cost nothing, and are there if another loss asks for them.
        return itself if self.plan.run is None else None

    def _open(self, source: ModelSource, *, trainable: bool = True) -> Any:
        gc.collect()  # the model before this one goes first
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return open_model(source, self.plan.material, self.config, self.device, trainable=trainable)

    def _missing(self, kind: str, identity: str, costs: Mapping[int, tuple[int, int]], advance: Advance) -> list[int]:
        """The numbers that the journal lacks; the others advance by their costs."""
        missing = [number for number in costs if self.journal.find(kind, identity, number) is None]
        for number in costs.keys() - set(missing):
            advance(*costs[number])
        return missing

    @cached_property
    def _costs(self) -> dict[int, tuple[int, int]]:
        """Pairs and tokens of each of this rank's batches."""
        costs = {}
        for number in self.ranks.share(len(self.plan.batches)):
            pairs = [self.plan.pairs[position] for position in self.plan.batches[number]]
            costs[number] = len(pairs), sum(pair.tokens for pair in pairs)
        return costs
