"""Checkpoint after checkpoint, batch after batch, each finding into the journal: what is there is not done again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gradent.auditing.measuring.batches import Reference, adapter_off, itself, measure_batches, measure_reference
from gradent.auditing.measuring.steps import (
    ARRIVING,
    LEAVING,
    SAMPLE,
    StepTask,
    Values,
    displacement,
    measure_along,
    measure_vectors,
    read_values,
    sample_gradient,
)
from gradent.auditing.measuring.tokens import measure_pair_tokens, token_cost
from gradent.auditing.state.config import AuditConfig
from gradent.auditing.state.journal import Journal, JournalError
from gradent.auditing.state.targets import AuditPlan, Target
from gradent.distributed import Ranks
from gradent.errors import GradentError
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
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
    step_failures: dict[str, str] = field(default_factory=dict)  # target's name -> why its steps are left out

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

    def measure_steps(self, tasks: Sequence[StepTask], advance: Advance) -> None:
        """What steps from and to each target, and one on the whole sample, do to every response; all ranks call it."""
        values: dict[str, Values] = {}
        for task in tasks:
            missing = {
                name: [number for number in self._costs if self.journal.find(name, identity, number) is None]
                for name, identity in task.identities.items()
            }
            named = sorted(
                {name for names in self.ranks.gather([[n for n in missing if missing[n]]]) for name in names}
            )
            if named:
                self._measure_directions(task, named, values)
            for cost in self._costs.values():
                advance(*cost)

    def measure_vectors(self, target: Target, advance: Advance) -> None:
        """Vectors of all rows' gradients on one target, in files beside the journal."""
        rows = 2 * len(self.plan.pairs)
        budget = parse_budget(self.config.memory_budget)
        width = max(1, (budget or DEFAULT_BUDGET) // (4 * rows))
        missing = self._missing("vectors", target.identity, self._costs, advance)
        batches, failures = [self.plan.batches[number] for number in missing], list[str]()
        try:
            if target.source is not None and missing:
                model = self._open(target.source)
                blocks = measure_vectors(model, self.plan.pairs, batches, width=width, memory_budget=budget)
                for number, (vectors, is_exact) in zip(missing, blocks, strict=True):
                    name = self.journal.save(f"{target.identity}-{number}", vectors)
                    content = {"positions": self.plan.batches[number], "file": name, "is_exact": is_exact}
                    self.journal.append("vectors", target.identity, number, content)
                    advance(*self._costs[number])
        except GradentError as error:
            if isinstance(error, JournalError):
                raise
            failures.append(str(error))
        failures = self.ranks.gather(failures)  # the first rank tells of them
        if failures:
            self.step_failures[target.name] = failures[0]

    def _measure_directions(self, task: StepTask, names: Sequence[str], values: dict[str, Values]) -> None:
        """Measure a target's batches along some directions; what fails on one rank is left out on all."""
        model: Any = None
        directions: dict[str, Values] = {}
        failures = list[str]()
        try:
            model, directions = self._open_between(task, names, values)
            if SAMPLE in names:
                batches = [self.plan.batches[number] for number in self._costs]
                directions[SAMPLE] = sample_gradient(
                    model, self.plan.pairs, batches, task.weights, engine=self.config.engine
                )
        except GradentError as error:
            failures.append(str(error))
        failures = self.ranks.gather(failures)  # before the ranks meet
        if not failures:
            self.ranks.sum(directions.get(SAMPLE, {}).values())
            failures = self.ranks.gather(self._measure_along(task, model, directions) if directions else [])
        if failures:
            self.step_failures[task.target.name] = failures[0]

    def _open_between(
        self, task: StepTask, names: Sequence[str], values: dict[str, Values]
    ) -> tuple[Any, dict[str, Values]]:
        """A target's model, and its displacements from and to those beside it; `values` keeps its parameters."""
        beside = {name: other for name, other in ((ARRIVING, task.before), (LEAVING, task.after)) if name in names}
        used = [*(other for other in beside.values() if other is not None), task.target]
        for name in values.keys() - {part.name for part in used}:
            del values[name]
        model: Any = None
        for part in used:  # the target comes last, and stays open
            if (part.name not in values or part is task.target) and part.source is not None:
                model = None
                model = self._open(part.source)
                values[part.name] = read_values(model)
        directions: dict[str, Values] = {}
        for name, other in beside.items():
            if other is not None:
                ends = [values[task.target.name], values[other.name]]
                step = displacement(*(ends if name == LEAVING else ends[::-1]))
                if isinstance(step, str):
                    self.tell(f"The step between {other.name} and {task.target.name} is not taken apart: {step}.")
                else:
                    directions[name] = step
        for name in values.keys() - {task.target.name}:  # the next task asks for this target's alone
            del values[name]
        return model, directions

    def _measure_along(self, task: StepTask, model: Any, directions: dict[str, Values]) -> list[str]:
        """Measure this rank's batches along the directions; what went wrong, if anything did."""
        options = {name: getattr(self.config, name) for name in ("engine", "by_module", "memory_budget")}
        identities = [(name, task.identities[name]) for name in directions]
        missing = [
            number for number in self._costs
            if any(self.journal.find(name, identity, number) is None for name, identity in identities)
        ]  # fmt: skip
        batches = [self.plan.batches[number] for number in missing]
        try:
            blocks = measure_along(model, self.plan.pairs, batches, directions, **options)
            for number, found in zip(missing, blocks, strict=True):
                for name, block in found.items():
                    self.journal.append(name, task.identities[name], number, block)
        except GradentError as error:
            if isinstance(error, JournalError):
                raise
            return [str(error)]
        return []

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
