"""Measuring inside a training loop, without a trainer: `attach(model)` and `Recorder.harvest()`.

Letters: N rows of a backward; k pairs, the active ones those that the loss moves on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gradent.attribution.step_accounts import StepAccounts
from gradent.distributed import world_size
from gradent.errors import InputError, ModelError
from gradent.hooks.piggyback.config import WatchConfig
from gradent.hooks.piggyback.observation import BackwardObservation, mark_completions
from gradent.hooks.piggyback.packed import PackedCall
from gradent.hooks.piggyback.pairing import Grouping, Groups, Pairing
from gradent.hooks.piggyback.watcher import Piggyback
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.measurement import measure, measure_rows, measure_weighted
from gradent.model.calls import tempered
from gradent.model.inputs import find_noise
from gradent.model.parameters import (
    NO_DOUBLE,
    compiled_modules,
    device_without_double,
    trainable,
    unwrap_compiled,
)
from gradent.model.preconditioner import metric_roots
from gradent.model.sharding import sharding, unwatchable
from gradent.notices import Notices
from gradent.pair_gram import PairGram, sum_modules, sum_parameters
from gradent.pairs.batch import PairBatch
from gradent.pairs.row_batch import RowBatch
from gradent.recorder.recording import (
    Recording,
    RowRecording,
    join_recordings,
    join_row_recordings,
    number_groups,
    with_account,
)
from gradent.row_gram import RowGram

__all__ = [
    "CHOICES",
    "NO_CONTRAST",
    "Mode",
    "Recorder",
    "Recording",
    "RowRecording",
    "WeightGrad",
    "attach",
    "check_choices",
]

Mode = Literal["auto", "piggyback", "measure"]
WeightGrad = Literal["shared"]

CHOICES: dict[str, tuple[Any, ...]] = {
    "mode": get_args(Mode), "pairing": (None, *get_args(Pairing)), "weight_grad": (None, *get_args(WeightGrad)),
}  # fmt: skip
"""What the arguments of `attach` accept, where that can be listed."""


NO_CONTRAST = (
    "gradent has nothing to say here, and records nothing: every row is pushed {}: there are no pairs and no groups in "
    "this loss (docs/groups.md says which losses have them). pairing= says how rows belong together, if they do."
)
"""What is said of supervised fine-tuning and its like, and of unlearning: all rows go up, or down."""


ALL_ZERO = (
    "gradent records nothing of this step: the loss moves its rows, and every gradient that was seen is zero, so that "
    "none was: the trainable parameters are not those that the model computes with (a wrapper's copies of them, a part "
    "of the model that these inputs do not reach)."
)
"""What is said where a backward reaches none of the parameters."""

UNSEEN = (
    "gradent records nothing: no forward of the model was seen in this step. The loss calls parts of it (a fused head, "
    "which takes hidden states and the head's weight), or another module than the one that is watched: attach(model) "
    "takes the module that the loop calls. probe_data needs no such forward."
)
"""What is said where the model's own forward never runs."""


TAKEN_FOR_GROUPS = (
    "gradent takes the rows of this loss for groups (rows of equal prompts), not for pairs: the first half of a batch "
    "does not have the prompts of the second half, or the loss does not pull the two apart. pairing='halves' says that "
    "they are pairs, groups= which rows belong together."
)
"""What is said where the data alone told it."""


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
    pairing: Pairing | None = None,
    by_module: bool = False,
    memory_budget: int | str | None = None,
    metric: torch.optim.Optimizer | None = None,
    compiled: nn.Module | None = None,
    trusted: bool = False,
    weight_grad: WeightGrad | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    accumulation: int = 1,
    groups: Groups | None = None,
    temperature: float = 1.0,
) -> Recorder:
    """Watch the model that a training loop runs, from `with` to the end of the block (or between `arm` and `disarm`).

    Args:
        model: the model that the loop calls with `input_ids`: of pairs, all chosen rows, then all rejected rows (or in
            two forwards, chosen first, before one backward); of rollouts, in any order.
        mode: "auto" reads the entries off the loop's own backward, and where that cannot be exact measures the same
            batch in a pass of gradent's own, saying why once. "piggyback" never makes a pass of its own, "measure"
            always does.
        pairing: which rows are chosen and which rejected, or "rows" where they are no pairs; see
            `gradent.hooks.piggyback.pairing.Pairing`. None lets the data say it: rows are pairs where the first half of
            a batch has the prompts of the second half, and the loss pulls the two responses of each prompt apart.
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
        groups: of rows that are no pairs, which belong together: "prompts" (None means this too), "batch", a number of
            rows that follow one another, a number for each row, or a function that gives these from `input_ids`. Other
            than None, it also says that rows are no pairs.
        temperature: what the loss divides logits by before it takes log-probs (GRPO's sampling temperature).

    Returns:
        The recorder, which is a context manager.

    Raises:
        InputError: an unknown mode, pairing or weight_grad, groups of another kind or beside a pairing of pairs, a
            temperature that is not above 0, or an accumulation that is no whole number from 1 on.

    Example:
        >>> with attach(model) as recorder:  # doctest: +SKIP
        ...     loss_of(model(**batch)).backward()
        ...     print(recorder.harvest().gram.cosine)
        ...     optimizer.step()
    """
    check_choices("attach", CHOICES, mode=mode, pairing=pairing, weight_grad=weight_grad)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise InputError(f"attach: accumulation={accumulation!r}; accepted is a whole number of backwards >= 1.")
    if groups is not None and pairing not in (None, "rows"):
        raise InputError(
            f"attach: pairing={pairing!r} says that rows are pairs, and groups={groups!r} that they are not."
        )
    if not temperature > 0:
        raise InputError(f"attach: temperature={temperature!r}; accepted is a number > 0.")
    watched = model if compiled is None else compiled
    config = WatchConfig(
        model=watched, budget=parse_budget(memory_budget) or DEFAULT_BUDGET,
        pairing=pairing if groups is None else "rows", grouping=Grouping("prompts" if groups is None else groups),
        temperature=temperature,
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
        self.metric = metric
        self._notices = Notices()
        self._accounts = StepAccounts(model, accumulation=accumulation, say=self._log_once)
        self._accounts.optimizer = optimizer
        self._model, self._config, self._mode, self._by_module = model, config, mode, by_module
        self._is_compiled = config.model is not model
        self.has_contrast = False
        """Whether any rows that nobody calls pairs or groups have been raised and others lowered."""
        self.has_moved = False
        """Whether the weights had moved already when a backward was settled: an optimizer that steps inside it."""
        self._refusal: str | None = None  # why the model is not watched although it was to be
        self._piggyback: Piggyback | None = None
        self._collected: list[Recording | RowRecording] = []
        self._backwards = 0
        self._reach: float | None = None  # how far packed rows see one another, once tried

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The loop's optimizer, of whose steps there are accounts; None for none."""
        return self._accounts.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._accounts.optimizer = optimizer

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
            ModelError: the model has no trainable parameter, or is on a device without float64 (MPS).
            InputError: `metric` is no Adam(W) optimizer that has taken a step.
        """
        if self.armed:
            return
        self.has_moved = False
        self._refusal = unwatchable(self._config.model)
        if self._refusal is not None:
            self._log_once(f"gradent cannot watch this model, and records nothing: {self._refusal}.")
            return
        kind = device_without_double(self._model)
        if kind is not None:
            raise ModelError(NO_DOUBLE.format(device=kind))
        parameters = trainable(self._model, sharded=True)
        kind = sharding(self._model)
        if self.metric is not None and kind is not None:
            raise ModelError(f"metric: the optimizer's state is sharded ({kind}); only metric=None is available there.")
        self._is_compiled = self._config.model is not self._model or bool(compiled_modules(self._model))
        if self._is_compiled:  # a capture would be traced
            self._config = replace(self._config, has_entries=False)
        weight = None if self.metric is None else metric_roots(self.metric, parameters)
        self._config = replace(self._config, parameters=parameters, weight=weight)
        self._config = replace(self._config, step=self._accounts.arm(self._config, self._account_obstacle()))
        self._piggyback = Piggyback(self._config)
        self._piggyback.arm()

    def _account_obstacle(self) -> str | None:
        """Why steps have no account, whatever the optimizer; None for no reason."""
        if self._config.should_share:
            return "weight_grad='shared' forms its products in another way"
        return None if self.metric is None else "with `metric`, products are measured in that geometry alone"

    @property
    def armed(self) -> bool:
        """Whether the model is being watched."""
        return self._piggyback is not None or self._refusal is not None

    def disarm(self) -> None:
        """Take every hook off the model."""
        if self._piggyback is not None:
            self._piggyback.disarm()
            self._piggyback = None
        self._refusal = None
        self._collected.clear()
        self._accounts.disarm()
        self._backwards = 0

    def harvest(
        self, *, scale: float = 1.0, lr: float | None = None, loss_scale: float = 1.0
    ) -> Recording | RowRecording | None:
        """What the backwards since the last call showed. Call it before `optimizer.step()`, and after clipping.

        Args:
            scale: what the loss was divided by before the backward beyond its mean over the pairs: the number of
                accumulated micro-batches. It scales `d_w` and `d_l`, and has no part in the weights of rows that are no
                pairs, which are those of the gradient that the optimizer gets.
            lr: learning rate of the step to come, for its attribution; None for that of each parameter group.
            loss_scale: a gradient scaler's scale, by which all weights are divided.

        Returns:
            The recording, of pairs or of rows that are no pairs; None where no backward came through the model, or
            where it cannot be read or measured (said once in the log).

        Raises:
            InputError: the recorder is not armed.
            ModelError: mode "piggyback", and a backward's entries cannot be exact; or neither way can be taken.
            GradentError: what `measure` raises.
        """
        self.collect()
        if self._piggyback is not None and not self._piggyback.forwards:
            self._log_once(UNSEEN)
        recordings, self._collected, self._backwards = self._collected, [], 0
        try:
            recording = self._refuse(_join(recordings, scale, loss_scale))
            if recording is None or not self._accounts.is_due:
                return recording
            assert self._piggyback is not None
            clock = self._piggyback.clock
            with clock:
                account = self._accounts.attribute(lr)
            seconds = recording.overhead_s + clock.take()
        finally:
            self._accounts.drop()
        if isinstance(recording, Recording):
            return replace(recording, attribution=account, overhead_s=seconds)
        return replace(with_account(recording, account), overhead_s=seconds)

    def _refuse(self, recording: Recording | RowRecording | None) -> Recording | RowRecording | None:
        """The recording; None, and a line in the log, of rows that nobody calls groups and that the loss all raises."""
        if recording is None or self._config.pairing is not None:
            return recording
        if isinstance(recording, Recording):  # before the loss has moved anything, nothing says that these are pairs
            return recording if len(recording.gram) or self._config.evidence.is_told else None
        weight = recording.rows.weight
        assert weight is not None
        if not self.has_contrast and bool((weight > 0).any() and (weight < 0).any()):
            self.has_contrast = True
            self._log_once(TAKEN_FOR_GROUPS)
        if self.has_contrast or not len(weight):
            return recording if self.has_contrast else None
        self._log_once(NO_CONTRAST.format("up" if bool((weight >= 0).all()) else "down"))
        return None

    def collect(self) -> int:
        """Settle the backwards since the last call, for the next harvest; their graphs are let go of.

        Returns:
            How many backwards the next harvest will join.

        Raises:
            InputError: the recorder is not armed.
            GradentError: as `harvest`.
        """
        if self._refusal is not None:
            return 0
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
            self._collected, self._backwards = [], 0  # half a step is none
            self._accounts.drop()
            raise
        return self._backwards

    def _settle(self, observation: BackwardObservation) -> Recording | RowRecording | None:
        """The recording of one backward; None, and a line in the log, where it cannot be used."""
        reason = observation.unusable_reason
        if reason is None and observation.sides == 1 and observation.is_reward:
            reason = "a reward model's rows are no pairs here (chosen rows, then rejected rows), and have no log-probs"
        if reason is None and observation.sides == 1 and self._config.pairing is None and not observation.is_of_tokens:
            reason = (
                "the loss is no weighting of the tokens' log-probs (a masked model, a distillation?), so that "
                "nothing tells pairs or groups; pairing= does"
            )
        if reason is None and not observation.is_constant and not mark_completions(observation):
            reason = "the loss weighs prompts too, so responses cannot be told apart"
        if reason is None and observation.packed_call is not None:
            reason = self._packing_obstacle(observation.packed_call)
        if reason is not None:
            self._log_once(f"gradent cannot read this step: {reason}.")
            return None
        obstacle = self._obstacle(observation)
        if observation.further and bool(observation.c.any()) and (self._mode == "measure" or obstacle is not None):
            self._log_once(
                f"gradent cannot measure this step: {obstacle or 'mode=measure asks for another pass'}; and a pass of "
                f"gradent's own gets tokens alone, while the model was given {', '.join(observation.further)} too."
            )
            return None
        recording = self._settle_pairs(observation) if observation.sides == 2 else self._settle_rows(observation)
        self.has_moved |= observation.weights is not None and observation.weights.has_moved()
        if recording is None:
            return None
        if self._config.should_share and not observation.shared and bool(observation.c.any()):
            self._log_once(
                "gradent: weight_grad='shared' found no weight gradient to share here, and the products are formed "
                "twice. It takes matrices used once a forward, chosen and rejected in one forward, a loss whose "
                "entries can be read off its backward, and no FSDP, torch.compile, reentrant checkpointing or "
                "offloaded activations."
            )
        return recording

    def _packing_obstacle(self, call: PackedCall) -> str | None:
        """Why packed rows cannot be measured: they see one another. Tried once; a sharded model is not tried."""
        if self._reach is None and call.has_neighbours:
            over = None if sharding(self._model) is not None else call.reaches_over()
            self._reach = 0.0 if over is None else over
        if not self._reach:
            return None
        return (
            "its responses lie in one row, and the model's attention reaches over their borders (other tokens before a "
            f"response change its logits by {self._reach:.1e}, scaled), so that no response has a log-prob of its own. "
            "Attention that keeps packed rows apart is needed: position_ids that restart without a 2-D attention_mask, "
            "or a block-diagonal mask; or switch packing off"
        )

    def _obstacle(self, observation: BackwardObservation) -> str | None:
        """Why a backward's entries cannot be read off it; None where they can."""
        return "the model is compiled" if self._is_compiled else observation.no_entries_reason

    def _settle_rows(self, observation: BackwardObservation) -> Recording | RowRecording | None:
        """The recording of a backward whose rows are no pairs; None, and a line in the log, where there can be none."""
        moves = [bool(tokens.any()) for tokens in observation.tokens]
        active = [row for row, is_moved in enumerate(moves) if is_moved and observation.rows[row][1].any()]
        rest = sorted(set(range(len(moves))) - set(active))
        labels = observation.group[active]
        group, obstacle = number_groups(labels), self._obstacle(observation)
        batch = RowBatch.from_rows([observation.rows[row] for row in active], group) if active else None
        needs_pass = bool(active) and (self._mode == "measure" or obstacle is not None)
        if needs_pass and self._bars_pass(observation, obstacle):
            return None
        if needs_pass:
            self._announce_pass(obstacle)
            assert batch is not None
            with tempered(self._config.temperature):
                rows = measure_rows(
                    self._model, batch, "all", self.metric, by_module=self._by_module,
                    memory_budget=self._config.budget,
                )  # fmt: skip
            self._compare(rows.logp, observation.logps[active], observation)
        else:
            rows = self._read_rows(observation, active, group)
        if not bool(rows.products.isfinite().all()) and self._has_overflow(observation):
            return self._overflown(observation)
        if active and not bool(rows.products.diagonal().any()):
            self._log_once(ALL_ZERO)
            return None
        self._accounts.add(observation, active, has_own_pass=needs_pass)
        return RowRecording(
            rows=replace(rows, weight=-observation.c[active] / world_size()), batch=batch, labels=labels,
            source="measure" if needs_pass else "piggyback", inactive=len(rest),
            inactive_labels=observation.group[rest], further=observation.further,
        )  # fmt: skip

    def _read_rows(self, observation: BackwardObservation, active: Sequence[int], group: Tensor) -> RowGram:
        """The `RowGram` of active rows in these groups, of entries that were read off the backward."""
        wanted, modules = observation.wanted, dict[str, Tensor]()
        shares = sum_modules(self._config.names, observation.entries, wanted.count_all)
        total = sum(shares.values(), torch.zeros(wanted.count_all, dtype=torch.float64))
        for name, share in shares.items() if self._by_module else ():
            modules[name] = wanted.matrix(share)[active][:, active]
        lengths = [int(observation.rows[row][1].sum()) for row in active]
        return RowGram(
            products=wanted.matrix(total)[active][:, active], logp=observation.logps[active],
            length=torch.tensor(lengths, dtype=torch.int64), group=group, modules=modules if self._by_module else None,
        )  # fmt: skip

    def _settle_pairs(self, observation: BackwardObservation) -> Recording | RowRecording | None:
        """The recording of a backward of pairs; None, and a line in the log, where there can be none."""
        pairs = observation.pairs
        obstacle = self._obstacle(observation)
        is_moved = (observation.c[:pairs] != 0) & (observation.c[pairs:] != 0)
        one_sided = self._one_sided(observation)
        if one_sided:
            obstacle = (
                obstacle or "the loss moves one side of a pair alone, and its backward has no gradient of the other"
            )
        moved = sorted({*is_moved.nonzero()[:, 0].tolist(), *one_sided})
        active = [pair for pair in moved if observation.is_reward or self._has_two_responses(observation, pair)]
        numbers = [] if observation.is_reward else [*active, *(pairs + pair for pair in active)]
        batch = PairBatch.from_rows([observation.rows[number] for number in numbers]) if numbers else None
        needs_pass = bool(active) and (self._mode == "measure" or obstacle is not None)
        along: Tensor | None = None
        if needs_pass and self._bars_pass(observation, obstacle):
            return None
        if needs_pass:
            is_weighted = not observation.is_constant and observation.is_of_tokens
            weights = [observation.tokens[number] for number in numbers] if is_weighted else None
            gram, along = self._measure(batch, obstacle, weights)
            theirs = observation.logps.view(2, -1)[:, active].flatten()
            self._compare(torch.cat([gram.chosen_logp, gram.rejected_logp]), theirs, observation)
        else:
            gram = self._read(observation).select(active)
            finite = (gram.chosen_sq + gram.rejected_sq + gram.inner).isfinite()
            if not bool(finite.all()) and self._has_overflow(observation):
                return self._overflown(observation)
        if active and not bool(gram.chosen_sq.any() or gram.rejected_sq.any()):
            self._log_once(ALL_ZERO)
            return None
        self._accounts.add(observation, active, has_own_pass=needs_pass)
        divisor = 2 * pairs + observation.unpaired if self._config.pairing == "signs" else pairs
        c, changes = observation.c * divisor, None if along is None else -along * divisor
        return Recording(
            gram=gram, d_w=-c[:pairs][active], d_l=c[pairs:][active], changes=changes,
            source="measure" if needs_pass else "piggyback", batch=batch, inactive=pairs - len(active),
            unpaired=observation.unpaired, further=observation.further,
        )  # fmt: skip

    def _one_sided(self, observation: BackwardObservation) -> list[int]:
        """Pairs of which the loss moves one side alone, where a pass of gradent's own can measure the other too."""
        mark = observation.weights
        bars = observation.is_reward or observation.further or sharding(self._model) is not None
        if self._mode == "piggyback" or bars or (mark is not None and mark.has_moved()):
            return []
        moves = (observation.c != 0).view(2, -1)
        has_marks = torch.tensor([bool(marks.any()) for _, marks in observation.rows]).view(2, -1)
        return (moves.any(0) & ~moves.all(0) & has_marks.all(0)).nonzero()[:, 0].tolist()

    def _has_overflow(self, observation: BackwardObservation) -> bool:
        """Whether what is not finite is float16's doing, which its loss scaler looks after; that is said."""
        if observation.is_half:
            self._log_once(
                "gradent counts the rows of a step as inactive: their gradients overflow in float16 at this loss "
                "scale, and the step is skipped by the loss scaler, which lowers it."
            )
        return observation.is_half

    def _overflown(self, observation: BackwardObservation) -> Recording | RowRecording:
        """The recording of a backward whose gradients overflowed: no row is active."""
        quiet = replace(
            observation, c=torch.zeros_like(observation.c), is_constant=True, no_entries_reason=None,
            tokens=[torch.zeros_like(tokens) for tokens in observation.tokens],
            entries={number: torch.zeros_like(entry) for number, entry in observation.entries.items()},
        )  # fmt: skip
        recording = self._settle_pairs(quiet) if observation.sides == 2 else self._settle_rows(quiet)
        assert recording is not None
        self._accounts.drop()  # of a step that will not be taken
        return recording

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
        self._announce_pass(obstacle)
        if batch is None:
            raise ModelError(
                f"the entries of a reward model cannot be read off the trainer's backward: {obstacle}. gradent has no "
                "pass of its own for it."
            )
        by_module, budget, metric = self._by_module, self._config.budget, self.metric
        if weights is None:
            return measure(self._model, batch, by_module=by_module, memory_budget=budget, metric=metric), None
        return measure_weighted(self._model, batch, weights, by_module=by_module, memory_budget=budget, metric=metric)

    def _bars_pass(self, observation: BackwardObservation, obstacle: str | None) -> bool:
        """Whether there can be no pass of gradent's own, which is said."""
        kind, mark = sharding(self._model), observation.weights
        if kind is not None:
            reason = f"a model sharded by {kind} allows no pass of gradent's own: its ranks would wait for one another"
        elif mark is not None and mark.has_moved():
            reason = (
                "the weights have moved since the backward, so that a pass of gradent's own would measure others: the "
                "optimizer steps inside the backward (LOMO, layerwise GaLore and APOLLO), or harvest() came after it"
            )
        else:
            return False
        cause = f"it cannot be read off the backward ({obstacle})"
        if obstacle is None:
            cause = "mode='measure' asks for a pass of gradent's own (mode='auto' reads off the backward what it can)"
        self._log_once(f"gradent records nothing of such a step: {cause}, and {reason}.")
        return True

    def _announce_pass(self, obstacle: str | None) -> None:
        """Say why a pass of gradent's own is made, unless none may be."""
        if self._mode == "piggyback":
            raise ModelError(
                f"the entries cannot be read off the trainer's backward: {obstacle}. Use mode='auto' or 'measure'."
            )
        if self._mode == "auto":
            text = (
                f"gradent measures in a forward and a backward of its own (as exact, but not free): {obstacle}. "
                "mode='measure' says that this is meant."
            )
            self._log_once(text.replace("as exact, but ", "") if find_noise(self._model) else text)

    def _compare(self, ours: Tensor, theirs: Tensor, observation: BackwardObservation) -> None:
        """Say so where gradent's own pass sees another function than the trainer's forward did."""
        noise = find_noise(self._model)
        if noise:
            self._log_once(
                f"gradent's own pass sees other log-probs than the trainer's forward, which has {' and '.join(noise)}: "
                "the entries are those of the model without."
            )
            return
        if not observation.is_constant and observation.sides == 2:
            return  # the trainer's log-probs were summed over other tokens
        if bool(((theirs - ours).abs() > 0.02 * theirs.abs().clamp_min(1.0)).any()):
            self._log_once(
                "gradent's own pass sees other log-probs than the trainer's forward: it has no dropout and no padding, "
                "and of the model's inputs it gets input_ids alone (no position_ids). The entries are its own."
            )

    def _read(self, observation: BackwardObservation) -> PairGram:
        """The `PairGram` of entries that were read off the backward."""
        pairs = observation.pairs
        modules = sum_parameters(self._config.names, [(range(pairs), observation.pair_entries())], pairs)
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


def _join(
    recordings: Sequence[Recording | RowRecording], scale: float, loss_scale: float
) -> Recording | RowRecording | None:
    """The recordings of a step as one; empty ones of another kind than the others are left out."""
    full = [part for part in recordings if len(part.gram if isinstance(part, Recording) else part.rows)] or recordings
    pairs = [part for part in full if isinstance(part, Recording)]
    if pairs:
        recording = join_recordings(pairs, scale=scale / loss_scale)
        _ = recording.verdict  # raises here where an entry is not finite
        return recording
    rows = [part for part in recordings if isinstance(part, RowRecording)]
    return join_row_recordings(rows, scale=1 / loss_scale) if rows else None
