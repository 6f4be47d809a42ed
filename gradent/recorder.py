"""Measuring inside a training loop, without a trainer: `attach(model)` and `Recorder.harvest()`.

Letters: k pairs of a backward, the active ones those that the loss moves on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from gradent.attribution.across import attribute_sketched, join_ranks
from gradent.attribution.own_pass import attribute_rows
from gradent.attribution.step import StepAttribution, attribute_backward, attribute_kept, step_metric
from gradent.attribution.update_rule import FIRST_STEP, UpdateRule, find_update_rule, unwrap_optimizer
from gradent.distributed import world_size
from gradent.errors import InputError, ModelError
from gradent.hooks.piggyback.config import RowStore, StepMetric, WatchConfig
from gradent.hooks.piggyback.observation import BackwardObservation, mark_completions
from gradent.hooks.piggyback.pairing import Pairing
from gradent.hooks.piggyback.watcher import Piggyback
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.measurement import measure, measure_weighted
from gradent.model.parameters import is_sharded, trainable, unwrap_compiled
from gradent.model.preconditioner import metric_roots
from gradent.notices import Notices
from gradent.pair_gram import PairGram, sum_parameters
from gradent.pairs.batch import PairBatch
from gradent.theory.conditions import Verdict

__all__ = ["CHOICES", "Mode", "Recorder", "Recording", "WeightGrad", "attach", "check_choices", "join_recordings"]

Mode = Literal["auto", "piggyback", "measure"]
WeightGrad = Literal["shared"]

CHOICES: dict[str, tuple[Any, ...]] = {
    "mode": get_args(Mode), "pairing": get_args(Pairing), "weight_grad": (None, *get_args(WeightGrad)),
}  # fmt: skip
"""What the arguments of `attach` accept, where that can be listed."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What one harvest found.

    Attributes:
        gram: Gram entries of the k pairs with a gradient. For a reward model they are those of the reward, and
            `chosen_logp`, `rejected_logp` are rewards.
        d_w: the trainer's own weight of each pair's chosen response, for a loss that is a mean over its pairs, `[k]`;
            the mean of its tokens' weights where they differ.
        d_l: the same for rejected.
        source: "piggyback" (read off the trainer's backward) or "measure" (a pass of gradent's own).
        batch: the tokens of the k pairs, in the gram's order; None for a reward model.
        inactive: pairs that the loss does not move, on either side or both: counted, not averaged.
        unpaired: rows that found no partner.
        overhead_s: wall time that gradent took, in seconds.
        attribution: what moved each of these responses in the step that follows; None without an optimizer, or where
            its step has no such account (said once in the log).
        changes: what plain gradient descent on each pair's own loss does to chosen and rejected, nats per unit of
            learning rate, float64 `[2, k]`, where the loss weighs the tokens of a response differently; else None, and
            `d_w` and `d_l` say it.
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

    @cached_property
    def verdict(self) -> Verdict:
        """What a step on each pair's own loss does to its two log-probs: by `d_w` and `d_l`, or by `changes`."""
        if self.changes is None:
            return Verdict.from_weights(self.gram, self.d_w, self.d_l)
        return Verdict.from_changes(self.gram, self.d_w, self.d_l, *self.changes)


def check_choices(place: str, choices: Mapping[str, tuple[Any, ...]], **values: Any) -> None:
    """Raise an `InputError` where a value is none of its choices."""
    for name, accepted in choices.items():
        if values[name] not in accepted:
            listed = ", ".join(map(repr, accepted))
            raise InputError(f"{place}: {name}={values[name]!r} is unknown; accepted are {listed}.")


def attach(
    model: nn.Module,
    *,
    mode: Mode = "auto",
    pairing: Pairing = "halves",
    by_module: bool = False,
    memory_budget: int | str | None = None,
    metric: torch.optim.Optimizer | None = None,
    compiled: nn.Module | None = None,
    trusted: bool = False,
    weight_grad: WeightGrad | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    accumulation: int = 1,
) -> Recorder:
    """Watch the model that a training loop runs, from `with` to the end of the block (or between `arm` and `disarm`).

    Args:
        model: the model that the loop calls with `input_ids` of all chosen rows, then all rejected rows (or in two
            forwards, chosen first, before one backward).
        mode: "auto" reads the entries off the loop's own backward, and where that cannot be exact measures the same
            batch in a pass of gradent's own, saying why once. "piggyback" never makes a pass of its own, "measure"
            always does.
        pairing: which rows are chosen and which rejected; see `gradent.hooks.piggyback.pairing.Pairing`.
        by_module: also give each module's share.
        memory_budget: scratch of the reductions, as in `measure`.
        metric: None for the Euclidean inner product, or the Adam(W) optimizer whose geometry is to be used.
        compiled: what `torch.compile` made of the model, if that is what the loop calls: coefficients are read off it,
            and the entries are measured on the model itself. Given as `model`, such a wrapper is recognised.
        trusted: the loss is known to see log-probs alone, whatever else the model is asked for (older releases of TRL
            ask for hidden states and leave them). Otherwise such an output sends "auto" to a pass of its own.
        weight_grad: None leaves the loop's backward alone. "shared" forms every row's product of a matrix's gradient
            once, for the entries and for the loop's own gradient, which spares the products of a measured step but sums
            that gradient in another order: the run is no longer the same to the bit. For parameters that are trained in
            full; the weight of a tied or fused head is measured as without.
        optimizer: the loop's own; then a recording's `attribution` says what moved each response in its next step, by
            source. SGD, Adam and AdamW are accounted for, in whichever implementation.
        accumulation: backwards of a step of the optimizer. With more than one, rows of different backwards meet in the
            account: their gradients are kept until the step where all of them fit half of `memory_budget`, else
            sketches of them.

    Returns:
        The recorder, which is a context manager.

    Raises:
        InputError: an unknown mode, pairing or weight_grad, or an accumulation that is no whole number from 1 on.

    Example:
        >>> with attach(model) as recorder:  # doctest: +SKIP
        ...     loss_of(model(**batch)).backward()
        ...     print(recorder.harvest().gram.cosine)
        ...     optimizer.step()
    """
    check_choices("attach", CHOICES, mode=mode, pairing=pairing, weight_grad=weight_grad)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise InputError(f"attach: accumulation={accumulation!r}; accepted is a whole number of backwards >= 1.")
    watched = model if compiled is None else compiled
    config = WatchConfig(
        model=watched, budget=parse_budget(memory_budget) or DEFAULT_BUDGET, pairing=pairing,
        has_entries=mode != "measure" and watched is unwrap_compiled(model), is_trusted=trusted,
        should_share=weight_grad is not None,
    )  # fmt: skip
    return Recorder(
        unwrap_compiled(model), config, mode=mode, by_module=by_module, metric=metric, optimizer=optimizer,
        accumulation=accumulation,
    )  # fmt: skip


class Recorder:
    """Watches a model between `arm` and `disarm`, and gives what its backwards showed when asked. Made by `attach`."""

    def __init__(
        self, model: nn.Module, config: WatchConfig, *, mode: Mode, by_module: bool,
        metric: torch.optim.Optimizer | None, optimizer: torch.optim.Optimizer | None = None,
        accumulation: int = 1,
    ) -> None:  # fmt: skip
        self._accumulation = accumulation
        self.metric, self.optimizer = metric, optimizer
        self._rule: UpdateRule | None = None
        self._steps = 0
        self._counter: RemovableHandle | None = None
        self._step: StepMetric | None = None
        self._accounts: list[tuple[BackwardObservation, list[int], bool]] = []
        self._model, self._config, self._mode, self._by_module = model, config, mode, by_module
        self._is_compiled = config.model is not model
        self._piggyback: Piggyback | None = None
        self._notices = Notices()
        self._collected: list[Recording] = []
        self._backwards = 0

    def __enter__(self) -> Self:
        """Arm."""
        self.arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disarm."""
        self.disarm()

    def arm(self) -> None:
        """Watch from now on; what the optimizer's geometry is now is what `metric` stands for.

        Raises:
            ModelError: the model has no trainable parameter.
            InputError: `metric` is no Adam(W) optimizer that has taken a step.
        """
        if self._piggyback is not None:
            return
        parameters = trainable(self._model, sharded=True)
        if self.metric is not None and is_sharded(self._model):
            raise ModelError("metric: the optimizer's state is sharded (FSDP); only metric=None is available there.")
        weight = None if self.metric is None else metric_roots(self.metric, parameters)
        step = None if self.optimizer is None else self._find_step
        self._rule, self._step = None, None
        self._count_steps()
        self._config = replace(self._config, parameters=parameters, weight=weight, step=step)
        self._piggyback = Piggyback(self._config)
        self._piggyback.arm()

    def _count_steps(self) -> None:
        """Count the optimizer's steps from here on: between a backward and its harvest there must be none."""
        optimizer = unwrap_optimizer(self.optimizer)
        if isinstance(optimizer, torch.optim.Optimizer):

            def count(*args: Any) -> None:
                self._steps += 1

            self._counter = optimizer.register_step_post_hook(count)

    def _find_step(self) -> StepMetric | None:
        """What the account takes of the step to come, with the optimizer as it is when the step's backward starts."""
        if self._step is None:
            self._steps = 0
            self._rule = self._find_rule(self._config.parameters)
            store = RowStore(self._config.budget // 2, backwards=self._accumulation, ranks=world_size())
            self._step = None if self._rule is None else step_metric(self._rule, store=store)
        return self._step

    def _find_rule(self, parameters: Mapping[str, Tensor]) -> UpdateRule | None:
        """The optimizer's step to come; None, and a line in the log, where it has no account."""
        rule: UpdateRule | str = "a sharded model's optimizer state is sharded too (FSDP)"
        if self._config.should_share:
            rule = "weight_grad='shared' forms its products in another way"
        elif self.metric is not None:
            rule = "with `metric`, products are measured in that geometry alone"
        elif not is_sharded(self._model):
            rule = find_update_rule(self.optimizer, parameters)
        if not isinstance(rule, str):
            return rule
        if rule != FIRST_STEP:
            self._log_once(f"gradent gives no account of steps: {rule}.")
        return None

    @property
    def armed(self) -> bool:
        """Whether the model is being watched."""
        return self._piggyback is not None

    def disarm(self) -> None:
        """Take every hook off the model."""
        if self._piggyback is not None:
            self._piggyback.disarm()
            self._piggyback = None
        self._collected.clear()
        self._accounts.clear()
        self._rule = self._step = None
        if self._counter is not None:
            self._counter.remove()
            self._counter = None
        self._backwards = 0

    def harvest(self, *, scale: float = 1.0, lr: float | None = None) -> Recording | None:
        """What the backwards since the last call showed. Call it before `optimizer.step()`, and after clipping.

        Args:
            lr: learning rate of the step to come, for its attribution; None for that of each parameter group.
            scale: what the loss was divided by before the backward beyond its mean over the pairs: the number of
                accumulated micro-batches, the inverse of a gradient scaler's scale. It scales `d_w` and `d_l`.

        Returns:
            The recording, or None where no backward came through the model.

        Raises:
            InputError: the recorder is not armed.
            ModelError: mode "piggyback", and a backward's entries cannot be exact; or neither way can be taken.
            GradentError: what `measure` raises.
        """
        self.collect()
        recordings, self._collected, self._backwards = self._collected, [], 0
        accounts, self._accounts = self._accounts, []
        self._step = None  # the next backward is another step's
        if not recordings:
            return None
        recording = join_recordings(recordings, scale=scale)
        if self._rule is not None:
            assert self._piggyback is not None
            clock = self._piggyback.clock
            try:
                with clock:
                    recording = replace(recording, attribution=self._attribute(accounts, self._rule, lr))
                recording = replace(recording, overhead_s=recording.overhead_s + clock.take())
            except Exception as error:  # noqa: BLE001  (what was measured must not be lost with its account)
                self._log_once(f"gradent gives no account of a step: gradent's own {type(error).__name__}: {error}")
        _ = recording.verdict  # raises here where an entry is not finite
        return recording

    def collect(self) -> int:
        """Settle the backwards since the last call, for the next harvest; their graphs are let go of.

        Returns:
            How many backwards the next harvest will join.

        Raises:
            InputError: the recorder is not armed.
            GradentError: as `harvest`.
        """
        if self._piggyback is None:
            raise InputError("the recorder is not armed; use it inside `with attach(model) as recorder:`.")
        clock = self._piggyback.clock
        try:
            for observation in self._piggyback.take():
                self._backwards += 1
                with clock:
                    recording = self._settle(observation)
                if recording is not None:
                    self._collected.append(replace(recording, overhead_s=clock.take()))
        except Exception:
            self._collected, self._accounts, self._backwards = [], [], 0  # half a step is none
            self._step = None  # the next backward is another step's
            raise
        return self._backwards

    def _attribute(
        self, accounts: Sequence[tuple[BackwardObservation, list[int], bool]], rule: UpdateRule, lr: float | None
    ) -> StepAttribution | None:
        """What moves the active pairs of some backwards; None, and a line in the log, where that is not known."""
        parts: list[StepAttribution] = []
        part: StepAttribution | str
        norms = accounts[-1][0].norms
        kept: float | str = "nothing was read off the backward" if norms is None else norms.factor()
        if self._steps:
            kept = "the weights have changed since the backward (harvest before each step of the optimizer)"
        if isinstance(kept, str):
            self._log_once(f"gradent gives no account of a step: {kept}.")
            return None
        share = kept / world_size()
        whole = [seen for seen, _, has_own_pass in accounts if seen.rows_kept and not has_own_pass]
        if len(whole) == len(accounts):
            return self._attribute_kept(accounts, share, lr)
        sketched = [seen for seen, _, has_own_pass in accounts if seen.sketches is not None and not has_own_pass]
        if len(sketched) == len(accounts) and all(seen.no_account_reason is None for seen in sketched):
            part = self._attribute_sketched(accounts, share, lr)
            if not isinstance(part, str):
                return part
            self._log_once(f"gradent's account of a step leaves out what other backwards of it do: {part}.")
        for observation, active, has_own_pass in accounts:
            if has_own_pass:
                part = self._attribute_by_pass(observation, active, share, lr)
            elif observation.rows_kept:
                part = self._attribute_kept([(observation, active, False)], share, lr)
            else:
                account = attribute_backward(observation, rule, kept=share, lr=lr)
                part = account if isinstance(account, str) else account.select(active)
                if len(accounts) > 1 or world_size() > 1 or observation.unpaired:
                    part = part if isinstance(part, str) else replace(part, is_whole=False)
            if isinstance(part, str):
                self._log_once(f"gradent gives no account of a step: {part}.")
                return None
            parts.append(part)
        return StepAttribution.join(parts)

    def _attribute_kept(
        self, accounts: Sequence[tuple[BackwardObservation, list[int], bool]], share: float, lr: float | None
    ) -> StepAttribution:
        """The account of backwards whose rows' gradients were kept, all together."""
        assert self._rule is not None
        observations = [observation for observation, _, _ in accounts]
        account = attribute_kept(observations, self._config.tensors, self._rule, kept=share, lr=lr)
        return account.select(_active_pairs(accounts))

    def _attribute_sketched(
        self, accounts: Sequence[tuple[BackwardObservation, list[int], bool]], share: float, lr: float | None
    ) -> StepAttribution | str:
        """The account of backwards whose rows' gradients were sketched, all together."""
        assert self._rule is not None
        observations = [observation for observation, _, _ in accounts]
        account = attribute_sketched(observations, self._rule, kept=share, lr=lr, ranks=world_size())
        return account if isinstance(account, str) else account.select(_active_pairs(accounts))

    def _attribute_by_pass(
        self, observation: BackwardObservation, active: Sequence[int], kept: float, lr: float | None
    ) -> StepAttribution | str:
        """The account of a backward's active pairs by a pass of gradent's own."""
        parameters = trainable(self._model)
        rule = find_update_rule(self.optimizer, parameters, is_next=True)
        if isinstance(rule, str):
            return rule
        numbers = [*active, *(observation.pairs + pair for pair in active)]
        rows = [observation.rows[number] for number in numbers]
        weights = None if observation.is_constant else [observation.tokens[number] for number in numbers]
        return attribute_rows(
            self._model, parameters, rows, observation.c[numbers], rule, kept=kept, lr=lr, budget=self._config.budget,
            weights=weights,
        )  # fmt: skip

    def _settle(self, observation: BackwardObservation) -> Recording | None:
        """The recording of one backward; None, and a line in the log, where it cannot be used."""
        reason = observation.unusable_reason
        if reason is None and not observation.is_constant and not mark_completions(observation):
            reason = "the loss weighs prompts too, so responses cannot be told apart"
        if reason is not None:
            self._log_once(f"gradent cannot read this step: {reason}.")
            return None
        pairs = observation.pairs
        is_moved = (observation.c[:pairs] != 0) & (observation.c[pairs:] != 0)
        moved = is_moved.nonzero()[:, 0].tolist()
        active = [pair for pair in moved if observation.is_reward or self._has_two_responses(observation, pair)]
        numbers = [] if observation.is_reward else [*active, *(pairs + pair for pair in active)]
        batch = PairBatch.from_rows([observation.rows[number] for number in numbers]) if numbers else None
        obstacle = "the model is compiled" if self._is_compiled else observation.no_entries_reason
        needs_pass = bool(active) and (self._mode == "measure" or obstacle is not None)
        along: Tensor | None = None
        if needs_pass:
            is_weighted = not observation.is_constant and observation.is_of_tokens
            weights = [observation.tokens[number] for number in numbers] if is_weighted else None
            gram, along = self._measure(batch, obstacle, weights)
            self._compare(gram, observation, active)
        else:
            gram = self._read(observation).select(active)
        self._accounts.append((observation, active, needs_pass))
        if self._config.should_share and active and not observation.shared:
            self._log_once(
                "gradent: weight_grad='shared' found no weight gradient to share here, and the products are formed "
                "twice. It takes matrices used once a forward, chosen and rejected in one forward, a loss whose "
                "entries can be read off its backward, and no FSDP, torch.compile, reentrant checkpointing or "
                "offloaded activations."
            )
        divisor = 2 * pairs + observation.unpaired if self._config.pairing == "signs" else pairs
        c, changes = observation.c * divisor, None if along is None else -along * divisor
        return Recording(
            gram=gram, d_w=-c[:pairs][active], d_l=c[pairs:][active], changes=changes,
            source="measure" if needs_pass else "piggyback", batch=batch, inactive=pairs - len(active),
            unpaired=observation.unpaired,
        )  # fmt: skip

    def _has_two_responses(self, observation: BackwardObservation, pair: int) -> bool:
        """Whether a pair's two rows differ; one and the same response is neither chosen nor rejected."""
        (chosen, of_w), (rejected, of_l) = (observation.rows[row] for row in (pair, observation.pairs + pair))
        is_same = torch.equal(chosen, rejected) and torch.equal(of_w, of_l)
        if is_same:
            self._log_once("gradent leaves out pairs of the batch whose chosen equals rejected; see `inactive`.")
        return not is_same

    def _measure(
        self, batch: PairBatch | None, obstacle: str | None, weights: Sequence[Tensor] | None
    ) -> tuple[PairGram, Tensor | None]:
        """Measure in a pass of gradent's own, with tokens' weights along the loss's gradient too; `obstacle` is why."""
        if is_sharded(self._model):
            raise ModelError(
                f"the entries cannot be read off the trainer's backward ({obstacle}), and a sharded model (FSDP) "
                "allows no pass of gradent's own: its ranks would wait for one another."
            )
        if batch is None:
            raise ModelError(
                f"the entries of a reward model cannot be read off the trainer's backward: {obstacle}. gradent has no "
                "pass of its own for it."
            )
        if self._mode == "piggyback":
            raise ModelError(
                f"the entries cannot be read off the trainer's backward: {obstacle}. Use mode='auto' or 'measure'."
            )
        if self._mode == "auto":
            self._log_once(
                f"gradent measures in a forward and a backward of its own (as exact, but not free): {obstacle}. "
                "mode='measure' says that this is meant."
            )
        by_module, budget, metric = self._by_module, self._config.budget, self.metric
        if weights is None:
            return measure(self._model, batch, by_module=by_module, memory_budget=budget, metric=metric), None
        return measure_weighted(self._model, batch, weights, by_module=by_module, memory_budget=budget, metric=metric)

    def _compare(self, gram: PairGram, observation: BackwardObservation, active: Sequence[int]) -> None:
        """Say so where gradent's own pass sees another function than the trainer's forward did."""
        if not observation.is_constant:
            return  # the trainer's log-probs were summed over other tokens
        theirs = observation.logps.view(2, -1)[:, active].flatten()
        ours = torch.cat([gram.chosen_logp, gram.rejected_logp])
        if bool(((theirs - ours).abs() > 0.02 * theirs.abs().clamp_min(1.0)).any()):
            self._log_once(
                "gradent's own pass sees other log-probs than the trainer's forward: it has no dropout and no padding, "
                "and of the model's inputs it gets input_ids alone (no position_ids). The entries are its own."
            )

    def _read(self, observation: BackwardObservation) -> PairGram:
        """The `PairGram` of entries that were read off the backward."""
        pairs = observation.pairs
        modules = sum_parameters(self._config.names, [(range(pairs), observation.entries)], pairs)
        totals = sum(modules.values(), torch.zeros(3, pairs, dtype=torch.float64))
        lengths = torch.tensor([int(marks.sum()) for _, marks in observation.rows], dtype=torch.int64)
        return PairGram(
            chosen_sq=totals[0], rejected_sq=totals[1], inner=totals[2], chosen_logp=observation.logps[:pairs],
            rejected_logp=observation.logps[pairs:], chosen_len=lengths[:pairs], rejected_len=lengths[pairs:],
            modules={name: (part[0], part[1], part[2]) for name, part in modules.items()} if self._by_module else None,
        )  # fmt: skip

    def _log_once(self, text: str) -> None:
        """Log a line once; figures in it, which differ from step to step, do not make it another one."""
        self._notices.once(text, key=re.sub(r"[\d.]+(e[+-]?\d+)?", "", text))


def _active_pairs(accounts: Sequence[tuple[BackwardObservation, list[int], bool]]) -> list[int]:
    """The active pairs of several backwards, as numbers among the pairs of all."""
    starts = [sum(seen.pairs for seen, _, _ in accounts[:place]) for place in range(len(accounts))]
    return [start + pair for start, (_, pairs, _) in zip(starts, accounts, strict=True) for pair in pairs]


def join_recordings(recordings: Sequence[Recording], *, scale: float = 1.0) -> Recording:
    """Recordings of one step (its micro-batches, its ranks; at least one) as one, with `d_w` and `d_l` scaled."""
    if len(recordings) == 1 and scale == 1.0:
        return recordings[0]
    d_w, d_l = (torch.cat([getattr(part, name) for part in recordings]) * scale for name in ("d_w", "d_l"))
    batches = [part.batch for part in recordings if part.batch is not None]
    accounts = [part.attribution for part in recordings if part.attribution is not None]
    changes: Tensor | None = None
    if any(part.changes is not None for part in recordings):
        verdicts = [part.verdict for part in recordings]
        changes = torch.cat([torch.stack([each.chosen_change, each.rejected_change]) for each in verdicts], 1) * scale
    return Recording(
        gram=PairGram.join([part.gram for part in recordings]), d_w=d_w, d_l=d_l, changes=changes,
        source="measure" if any(part.source == "measure" for part in recordings) else "piggyback",
        batch=PairBatch.join(batches) if batches else None, inactive=sum(part.inactive for part in recordings),
        unpaired=sum(part.unpaired for part in recordings), overhead_s=sum(part.overhead_s for part in recordings),
        attribution=join_ranks(accounts) if len(accounts) == len(recordings) else None,
    )  # fmt: skip
