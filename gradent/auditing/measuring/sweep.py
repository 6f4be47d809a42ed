"""Checkpoint after checkpoint, batch after batch, each finding into the journal: what is there is not done again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gradent.auditing.measuring.batches import Reference, adapter_off, itself, scan_batches, scan_reference
from gradent.auditing.measuring.tokens import scan_tokens, token_cost
from gradent.auditing.state.journal import Journal, JournalError
from gradent.auditing.state.ranks import Ranks
from gradent.auditing.state.targets import ReferenceChoice, Target
from gradent.errors import GradentError
from gradent.loading.preferences import AuditPair
from gradent.loading.prepare import Material, describe_model, open_model

__all__ = ["Sweep"]

Advance = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One audit's measuring: every rank makes one, and each measures its share of the batches.

    Attributes:
        targets: what to measure, by step.
        reference: where the reference's log-probs come from.
        material: the pairs.
        batches: positions of pairs, batch by batch.
        journal: of this rank.
        ranks: which process this is.
        device: where models go.
        dtype: as in `audit`, and so are the rest.
        engine: see there.
        by_module: see there.
        memory_budget: see there.
        trust_remote_code: see there.
        several: whether a target that fails is left out, so that the others are still measured.
        tell: takes notes.
        failures: why a target is left out, by its name: at first those with a problem, then what fails on the way.
        token_failures: why tokens were not measured.
    """

    targets: Sequence[Target]
    reference: ReferenceChoice
    material: Material
    batches: Sequence[Sequence[int]]
    journal: Journal
    ranks: Ranks
    device: str
    dtype: str
    engine: str
    by_module: bool
    memory_budget: int | str | None
    trust_remote_code: bool
    several: bool
    tell: Callable[[str], None]
    failures: dict[str, str]
    token_failures: list[str] = field(default_factory=list)

    def measure_reference(self, advance: Advance) -> None:
        """The log-probs of a reference that is a model of its own, once for all targets.

        Args:
            advance: called with the pairs and tokens that are done.
        """
        source = self.reference.source
        if source is None:
            return
        left = self._left("reference", self.reference.identity, advance)
        if not left:
            return
        model = self._open(source, trainable=False)
        blocks = scan_reference(model, self.material.pairs.pairs, [self.batches[number] for number in left])
        for number, block in zip(left, blocks, strict=True):
            self.journal.append("reference", self.reference.identity, number, block)
            advance(*self._cost(number))

    def measure_targets(self, advance: Advance) -> None:
        """The Gram entries of every pair on every target.

        Args:
            advance: called with the pairs and tokens that are done.

        Raises:
            JournalError: nothing more can be written down.
            GradentError: what went wrong, where there is a single target.
        """
        for target in self.targets:
            if target.name in self.failures:
                continue
            try:
                self._measure_target(target, advance)
            except JournalError:
                raise
            except GradentError as error:
                if not self.several:
                    raise
                self.failures[target.name] = str(error)

    def measure_tokens(self, target: Target, pairs: Sequence[AuditPair], advance: Advance) -> None:
        """The token matrices of some pairs on one target.

        Args:
            target: the model.
            pairs: those pairs.
            advance: called with 1 and what the pair cost.
        """
        own = [pairs[number] for number in self.ranks.share(len(pairs))]
        done = [pair for pair in own if self.journal.find("tokens", target.identity, pair.row) is not None]
        for pair in done:
            advance(1, token_cost(pair))
        left = [pair for pair in own if pair not in done]
        if not left or target.source is None:
            return
        model = self._open(target.source)
        for pair in sorted(left, key=token_cost, reverse=True):  # what cannot be done fails at once
            columns = scan_tokens(model, self.material.tokenizer, [pair], memory_budget=self.memory_budget)
            self.journal.append("tokens", target.identity, pair.row, columns)
            advance(1, token_cost(pair))

    def _measure_target(self, target: Target, advance: Advance) -> None:
        left = self._left("batch", target.identity, advance)
        if target.source is None or not left:
            return
        model = self._open(target.source)
        if self.journal.find("model", target.identity) is None:
            described = describe_model(model, target.source, target.step, self.device)
            self.journal.append("model", target.identity, 0, described)
        blocks = scan_batches(
            model, self.material.pairs.pairs, [self.batches[number] for number in left],
            reference=self._in_place(model), engine=self.engine, by_module=self.by_module,
            memory_budget=self.memory_budget,
        )  # fmt: skip
        for number, block in zip(left, blocks, strict=True):
            self.journal.append("batch", target.identity, number, block)
            advance(*self._cost(number))

    def _in_place(self, model: Any) -> Reference | None:
        """A reference that is the model under measurement, in one way or another."""
        if self.reference.kind == "adapter_off" and self.reference.source is None:
            return adapter_off(model)
        # It costs nothing, and is there if another loss asks for it.
        return None if self.several else itself

    def _open(self, source: Any, *, trainable: bool = True) -> Any:
        gc.collect()  # the model before this one goes first
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return open_model(
            source, self.material, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code,
            trainable=trainable,
        )  # fmt: skip

    def _left(self, kind: str, identity: str, advance: Advance) -> list[int]:
        """This rank's batches that the journal has not."""
        left = []
        for number in self.ranks.share(len(self.batches)):
            if self.journal.find(kind, identity, number) is None:
                left.append(number)
            else:
                advance(*self._cost(number))
        return left

    def _cost(self, number: int) -> tuple[int, int]:
        """Pairs and tokens of a batch."""
        pairs = [self.material.pairs.pairs[position] for position in self.batches[number]]
        return len(pairs), sum(pair.tokens for pair in pairs)
