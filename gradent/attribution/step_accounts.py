"""The accounts of the steps of a training loop, one after the other: which way each is made, and why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradent.attribution.across import attribute_sketched
from gradent.attribution.own_pass import attribute_rows
from gradent.attribution.roles import Roles
from gradent.attribution.step import StepAttribution, attribute_backward, attribute_kept, step_metric
from gradent.attribution.update_rule import FIRST_STEP, UpdateRule, find_update_rule, unwrap_optimizer
from gradent.distributed import world_size
from gradent.hooks.piggyback.config import RowStore, StepMetric, WatchConfig
from gradent.hooks.piggyback.observation import BackwardObservation
from gradent.model.parameters import trainable
from gradent.model.sharding import sharding

__all__ = ["StepAccounts"]


@dataclass(frozen=True, eq=False)
class _Seen:
    """One backward of the step, its active pairs or rows, and whether a pass of gradent's own measured them."""

    observation: BackwardObservation
    members: list[int]
    has_own_pass: bool

    @property
    def count(self) -> int:
        """Its pairs, or rows."""
        return len(self.observation.c) // self.observation.sides


class StepAccounts:
    """What moved the rows of each step of an optimizer."""

    def __init__(self, model: nn.Module, *, accumulation: int, say: Callable[[str], object]) -> None:
        """`accumulation` backwards are of one step; `say` logs a text once."""
        self.optimizer: torch.optim.Optimizer | None = None
        self._model, self._accumulation, self._say = model, accumulation, say
        self._config: WatchConfig | None = None
        self._obstacle: str | None = None
        self._rule: UpdateRule | None = None
        self._step: StepMetric | None = None
        self._steps = 0
        self._counter: RemovableHandle | None = None
        self._seen: list[_Seen] = []

    def arm(self, config: WatchConfig, obstacle: str | None) -> Callable[[], StepMetric | None] | None:
        """Get ready for steps of what is watched, which `obstacle` keeps from having accounts; how a backward asks."""
        self._config, self._obstacle = config, obstacle
        self._rule = self._step = None
        optimizer = unwrap_optimizer(self.optimizer)
        if isinstance(optimizer, torch.optim.Optimizer):

            def count(*args: Any) -> None:
                self._steps += 1

            self._counter = optimizer.register_step_post_hook(count)
        return None if self.optimizer is None else self._find_step

    def disarm(self) -> None:
        """Let go of everything."""
        self._seen.clear()
        self._rule = self._step = None
        if self._counter is not None:
            self._counter.remove()
            self._counter = None

    def drop(self) -> None:
        """Forget the running step: the next backward is another step's."""
        self._seen, self._step = [], None

    def _find_step(self) -> StepMetric | None:
        """What the account takes of the step to come, with the optimizer as it is when the step's backward starts."""
        assert self._config is not None
        if self._step is None:
            self._steps = 0
            self._rule = self._find_rule(self._config.parameters)
            store = RowStore(self._config.budget // 2, backwards=self._accumulation, ranks=world_size())
            self._step = None if self._rule is None else step_metric(self._rule, store=store)
        return self._step

    def _find_rule(self, parameters: Mapping[str, Tensor]) -> UpdateRule | None:
        """The optimizer's step to come; None, and a line in the log, where it has no account."""
        kind = sharding(self._model)
        rule: UpdateRule | str = f"a sharded model's optimizer state is sharded too ({kind})"
        if self._obstacle is not None:
            rule = self._obstacle
        elif kind is None:
            rule = find_update_rule(self.optimizer, parameters)
        if not isinstance(rule, str):
            return rule
        if rule != FIRST_STEP:
            self._say(f"gradent gives no account of steps: {rule}.")
        return None

    def add(self, observation: BackwardObservation, members: list[int], *, has_own_pass: bool) -> None:
        """Take in a backward of the step, with its active pairs or rows."""
        self._seen.append(_Seen(observation, members, has_own_pass))

    @property
    def is_due(self) -> bool:
        """Whether the step to come has an account."""
        return self._rule is not None and bool(self._seen)

    def attribute(self, lr: float | None) -> StepAttribution | None:
        """What moves the active rows of the step's backwards; None, and a line in the log, where it is not known."""
        try:
            account = self._attribute(lr)
        except Exception as error:  # noqa: BLE001  (what was measured must not be lost with its account)
            account = f"gradent's own {type(error).__name__}: {error}"
        if not isinstance(account, str):
            return account
        self._say(f"gradent gives no account of a step: {account}.")
        return None

    def _attribute(self, lr: float | None) -> StepAttribution | str:
        assert self._rule is not None
        parts: list[StepAttribution] = []
        seen, norms = self._seen, self._seen[-1].observation.norms
        kept: float | str = "nothing was read off the backward" if norms is None else norms.factor()
        if self._steps:
            kept = "the weights have changed since the backward (harvest before each step of the optimizer)"
        if isinstance(kept, str):
            return kept
        share = kept / world_size()
        observations = [each.observation for each in seen]
        if all(each.observation.rows_kept and not each.has_own_pass for each in seen):
            return self._of_kept(seen, share, lr)
        if all(
            each.sketches is not None and each.no_account_reason is None and not one.has_own_pass
            for each, one in zip(observations, seen, strict=True)
        ):
            account = attribute_sketched(observations, self._rule, kept=share, lr=lr, ranks=world_size())
            if not isinstance(account, str):
                return account.select(_members(seen))
            self._say(f"gradent's account of a step leaves out what other backwards of it do: {account}.")
        for each in seen:
            part = self._of_one(each, share, lr)
            if isinstance(part, str):
                return part
            parts.append(part)
        return StepAttribution.join(parts)

    def _of_one(self, each: _Seen, share: float, lr: float | None) -> StepAttribution | str:
        """The account of one backward by itself."""
        assert self._rule is not None
        if each.has_own_pass:
            return self._by_pass(each, share, lr)
        if each.observation.rows_kept:
            return self._of_kept([each], share, lr)
        account = attribute_backward(each.observation, self._rule, kept=share, lr=lr)
        if isinstance(account, str):
            return account
        is_whole = len(self._seen) == 1 and world_size() == 1 and not each.observation.unpaired
        return replace(account.select(each.members), is_whole=account.is_whole and is_whole)

    def _of_kept(self, seen: Sequence[_Seen], share: float, lr: float | None) -> StepAttribution:
        """The account of backwards whose rows' gradients were kept, all together."""
        assert self._rule is not None
        assert self._config is not None
        observations = [each.observation for each in seen]
        account = attribute_kept(observations, self._config.tensors, self._rule, kept=share, lr=lr)
        return account.select(_members(seen))

    def _by_pass(self, each: _Seen, kept: float, lr: float | None) -> StepAttribution | str:
        """The account of a backward's active rows by a pass of gradent's own."""
        assert self._config is not None
        parameters, observation = trainable(self._model), each.observation
        rule = find_update_rule(self.optimizer, parameters, is_next=True)
        if isinstance(rule, str):
            return rule
        numbers = [member + side * each.count for side in range(observation.sides) for member in each.members]
        rows = [observation.rows[number] for number in numbers]
        weights = None if observation.is_constant else [observation.tokens[number] for number in numbers]
        c = observation.c[numbers]
        roles = Roles.by_coefficients(observation.sides, observation.group[numbers], c)
        return attribute_rows(
            self._model, parameters, rows, c, rule, roles, kept=kept, lr=lr, budget=self._config.budget,
            weights=weights, temperature=self._config.temperature,
        )  # fmt: skip


def _members(seen: Sequence[_Seen]) -> list[int]:
    """The active pairs, or rows, of several backwards, as numbers among those of all."""
    starts = [sum(each.count for each in seen[:place]) for place in range(len(seen))]
    return [start + member for start, each in zip(starts, seen, strict=True) for member in each.members]
