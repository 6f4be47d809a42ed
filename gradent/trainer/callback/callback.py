"""`EntanglementCallback`: one line in any Hugging Face trainer.

Letters: N rows of a step.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainingArguments

from gradent.attribution.step import StepAttribution
from gradent.attribution.update_rule import is_diagonal
from gradent.attribution.whole_step import WholeStep
from gradent.distributed import gather, is_first
from gradent.errors import InputError
from gradent.hooks.piggyback.pairing import Groups, Pairing
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.measurement import row_logps
from gradent.model.parameters import NO_DOUBLE, device_without_double, trainable
from gradent.model.preconditioner import describe_optimizer, is_adam, metric_obstacle
from gradent.model.sharding import sharding, unwatchable
from gradent.notices import Notices, log
from gradent.pairs.batch import PairBatch
from gradent.proxies import PairProxies
from gradent.record.stream import check_folder
from gradent.recorder import CHOICES, Mode, Recorder, WeightGrad, attach, check_choices
from gradent.recorder.recording import Recording, RowRecording, with_account
from gradent.report.live.alerts import DEFAULT_ALERT, Alert
from gradent.report.live.shown import ShownScalars
from gradent.trainer.callback.engines import before_step, engine_loss_scale
from gradent.trainer.callback.fault_guard import LIMIT, guarded_event
from gradent.trainer.callback.hf_frames import divides_loss, find_trainer, has_logger, move_to_front, on_broken_step
from gradent.trainer.callback.implied_rows import ImpliedRows, implied_rows
from gradent.trainer.callback.journal import GroupJournal, Journal, PairJournal, same_kind
from gradent.trainer.callback.loss_division import LossDivision
from gradent.trainer.callback.probe import Probe
from gradent.trainer.callback.stand_ins import step_proxies
from gradent.trainer.callback.unseen import UnseenPairs
from gradent.trainer.records.proxies import join_proxies
from gradent.trainer.records.row_step import RowStepRecord
from gradent.trainer.records.step import StepRecord
from gradent.trainer.records.token_map import TokenMap, map_tokens

__all__ = ["EntanglementCallback"]

KEPT = 1000
"""Measured steps that `records` holds."""

KEPT_MATRICES = 10
"""Of these, the last ones that hold products and pushes of more rows than `LARGE`."""

_CHOICES = CHOICES | {"pairing": (None, *CHOICES["pairing"]), "metric": (None, "adam"), "on_error": ("warn", "raise")}


class EntanglementCallback(TrainerCallback):
    """Measures gradient entanglement while a trainer runs, and logs it under `gradent/...`.

    `DPOTrainer(..., callbacks=[EntanglementCallback(every=10)])` is the whole integration; so it is for TRL's CPO,
    ORPO, TPO and reward trainers, for those whose rows are no pairs (GRPO, RLOO, KTO), and for a `transformers.Trainer`
    whose batches hold chosen rows, then rejected rows of the same prompts, or rollouts. Where a loss pushes every row
    up (SFT), there is nothing to measure: that is said, and nothing is recorded.
    The run is the same to the bit with and without it (unless `weight_grad="shared"` is asked for).

    Args:
        every: measure the first step and every `every`-th one.
        mode: "auto", "piggyback" or "measure"; see `gradent.attach`.
        by_module: log the cosine of each layer too, as `gradent/layer/<name>/cosine`.
        pairing: which rows are chosen and which rejected, or "rows" where they are no pairs; by default what the
            trainer's configuration implies, and where that says nothing, the data (see `gradent.attach`).
        groups: of rows that are no pairs, which belong together, as in `gradent.attach`; by default those of one
            prompt, and of KTO, whose prompts differ, all rows of a batch.
        metric: None for the Euclidean inner product, "adam" for the geometry of the trainer's Adam(W) at that step
            (from the second step on, when it has one).
        memory_budget: scratch of the reductions, as in `measure`.
        probe_data: held-out pairs that are measured every `probe_every` steps, so that curves are comparable along a
            run: a `PairBatch`, or rows in one of TRL's preference formats (a dataset, a list of dicts). Logged as
            `gradent/probe/...`, with equal weights for the cases.
        probe_every: steps between two looks at the probe; by default `every`.
        realised: measure how much chosen and rejected really moved in each measured step, beside the prediction: by one
            more forward on either side of the optimizer's step, without dropout.
        attribution: say for each measured step what moved chosen and rejected, by source: the response itself, its
            partner, other pairs, earlier micro-batches, momentum, weight decay (`record.attribution`, logged as
            `gradent/moved/...`). For SGD, Adam and AdamW; of any other optimizer's step the total alone, where a copy
            of the trainable parameters fits `memory_budget`. Beside `realised`, also the share that this explains.
        tokens_every: also measure, every so many steps, the token matrix of the step's most entangled pair (0: never).
            It costs about a forward and a backward a token of the two responses. Kept in the record (`record.tokens`),
            and shown as a heat map in a running wandb run.
        proxies: also take the cheap stand-ins of the measured pairs (CHES, the head's block), by one more forward
            without dropout: kept in the record (`record.proxies`), and logged as `gradent/proxy/...`, with their rank
            correlation with the exact cosine, so that a run shows how far they can be trusted on its model and data.
        out: directory for `pairs.jsonl`, the pairs of every measured step (or `rows.jsonl`, rows that are no pairs),
            appended as they come.
        alert: when to say a verdict in words in the log; None for never.
        panels: send heat maps, tables and the like to a running wandb run.
        detail: give wandb, TensorBoard, trackio and the like every `gradent/...` scalar of `log_history`, not only the
            few that docs/dashboard.md starts with.
        weight_grad: None, or "shared": a measured step's own weight gradients come out of the measured products, which
            then cost no matrix product of their own, but are summed in another order (not the same to the bit); see
            `gradent.attach`.
        on_error: "warn" logs gradent's own errors and leaves the run alone, "raise" raises them.

    Attributes:
        records: the last 1000 measured steps, on rank 0 with the rows of all ranks: a `StepRecord` each, or of rows
            that are no pairs a `RowStepRecord`, with `.rows`. Of a step of more than 64 responses, the matrices of its
            attribution are held until ten more steps were measured.

    Raises:
        InputError: an argument outside of what is accepted.
    """

    def __init__(
        self,
        every: int = 10,
        *,
        mode: Mode = "auto",
        by_module: bool = False,
        pairing: Pairing | None = None,
        groups: Groups | None = None,
        metric: Literal["adam"] | None = None,
        memory_budget: int | str | None = None,
        probe_data: PairBatch | Sequence[Mapping[str, Any]] | Any = None,
        probe_every: int | None = None,
        realised: bool = False,
        attribution: bool = True,
        tokens_every: int = 0,
        proxies: bool = False,
        out: str | os.PathLike[str] | None = None,
        alert: Alert | None = DEFAULT_ALERT,
        panels: bool = True,
        detail: bool = False,
        weight_grad: WeightGrad | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        for name, number in (("every", every), ("probe_every", probe_every)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise InputError(f"EntanglementCallback: {name}={number!r}; accepted is a whole number of steps >= 1.")
        if not isinstance(tokens_every, int) or tokens_every < 0:
            raise InputError(
                f"EntanglementCallback: tokens_every={tokens_every!r}; accepted is a number of steps, or 0 (never)."
            )
        check_choices(
            "EntanglementCallback", _CHOICES,
            mode=mode, pairing=pairing, weight_grad=weight_grad, metric=metric, on_error=on_error,
        )  # fmt: skip
        parse_budget(memory_budget)
        if alert is not None and not isinstance(alert, Alert):
            raise InputError(
                f"EntanglementCallback: alert={alert!r}; accepted is an Alert, such as Alert(both_down=0.5) (from "
                "gradent.report.live.alerts), or None for never."
            )
        if out is not None:
            check_folder(out)
        self.records: deque[StepRecord | RowStepRecord] = deque(maxlen=KEPT)
        self.every, self.by_module, self.realised, self.tokens_every = every, by_module, realised, tokens_every
        self.on_error: str = on_error
        self.errors = 0
        self.notices = Notices()
        self._pairing, self._groups, self._metric, self._budget = pairing, groups, metric, memory_budget
        self._rows = ImpliedRows()
        self._attribution, self._has_proxies = attribution, proxies
        self._options: dict[str, Any] = {"mode": mode, "memory_budget": memory_budget, "weight_grad": weight_grad}
        self._probe = None if probe_data is None else Probe(probe_data, every=probe_every or every)
        self._out = None if out is None else Path(out)
        self._alert, self._has_panels = alert, panels
        self._journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._pending: Recording | RowRecording | None = None
        self._tokens: TokenMap | None = None
        self._logps_before: Tensor | None = None
        self._proxies: PairProxies | None = None
        self._whole_step: WholeStep | None = None
        self._division = LossDivision()
        self._loss_scale = 1.0
        self._unseen = UnseenPairs(self.notices.once)
        self._is_measuring = False
        self._detail = detail
        self._shown = ShownScalars(detail=detail)
        self._engine_scale = 1.0
        self._step_hook: RemovableHandle | None = None
        self._take_off: Callable[[], None] | None = None
        self._attempt = 0  # records of the training that runs
        self._window: list[Any] = []
        self._scalars: dict[str, float] = {}

    @guarded_event
    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a place in front of the loggers."""
        move_to_front(self)

    @guarded_event
    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Get ready: what is watched, and where records go."""
        move_to_front(self)  # added after the trainer was made, it did not hear of `on_init_end`
        self.step_aside()  # from a training that was broken off
        self._release_step()
        if self._journal is not None:
            self._forget_attempt(state.global_step)
        self._close_journal()
        self._recorder = None
        self._attempt = 0
        self.errors = 0
        self.notices.clear()
        self._window.clear()
        self._shown = ShownScalars(detail=self._detail)
        self._unseen = UnseenPairs(self.notices.once)
        self._rows = self._find_rows(args)
        if self._rows.refusal is not None:
            trainer = find_trainer()
            place = type(args).__name__.replace("Config", "Trainer") if trainer is None else type(trainer).__name__
            self.notices.once(
                f"gradent has nothing to say in {place}, and records nothing: {self._rows.refusal}; see "
                "docs/groups.md. pairing= and groups= say how rows belong together, if they do."
            )
            return
        kind = device_without_double(kwargs["model"])
        if kind is not None:
            self._probe = None
            self.notices.once(NO_DOUBLE.format(device=kind))
            return
        trainer = find_trainer() if getattr(args, "torch_compile", False) else None
        self._recorder = attach(
            kwargs["model"], pairing=self._rows.pairing, groups=self._rows.groups, by_module=True,
            temperature=self._rows.temperature,
            compiled=None if trainer is None else trainer.model_wrapped,
            trusted=type(args).__module__.startswith("trl."),
            accumulation=max(1, args.gradient_accumulation_steps), **self._options,
        )  # fmt: skip
        if not getattr(args, "mask_detach", True):
            self.notices.once(
                "with mask_detach=False the policy learns through its scores too, which is no gradient of log-probs: "
                "gradent's verdicts are without that part, and accounts have it in earlier_batches."
            )
        if self._probe is not None:
            self._probe.prepare(kwargs.get("processing_class"), args)

    def _find_rows(self, args: TrainingArguments) -> ImpliedRows:
        """How rows belong together: what the user says of it, else what the trainer's configuration implies."""
        implied = implied_rows(args, find_trainer())
        if self._groups is not None:
            return replace(implied, pairing=self._pairing, groups=self._groups, refusal=None)
        if self._pairing is None:
            return implied
        groups = implied.groups if self._pairing == "rows" else None
        return replace(implied, pairing=self._pairing, groups=groups, refusal=None)

    @guarded_event
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Arm before a step that is to be measured."""
        self._release_step()
        step = state.global_step + 1
        self._pending = self._tokens = self._logps_before = self._proxies = None
        self._loss_scale = 1.0
        self._is_measuring = step == 1 or step % self.every == 0 or self._is_tokens_step(step)
        if self._recorder is None or not self._is_measuring or self.errors >= LIMIT:
            return
        optimizer = kwargs.get("optimizer")
        if self._metric == "adam":
            is_known = optimizer is not None and is_adam(optimizer)
            if optimizer is None or (is_known and state.global_step == 0):
                self._is_measuring = False  # before its first step, Adam has no geometry
                return
            self._recorder.metric = self._find_metric(kwargs["model"], optimizer)
        self._prepare_account(kwargs["model"], optimizer if self._attribution else None)
        self._recorder.arm()
        self._engine_scale = engine_loss_scale(optimizer)
        told = {"model": kwargs["model"], "optimizer": optimizer}
        self._step_hook = before_step(optimizer, lambda: self.on_pre_optimizer_step(args, state, control, **told))
        trainer = find_trainer()
        self._take_off = None if trainer is None else on_broken_step(trainer, self.leave)
        if args.gradient_accumulation_steps > 1:
            self._division.watch(trainer)
        else:
            self._division.forget()

    def _find_metric(self, model: nn.Module, optimizer: Any) -> Any:
        """The optimizer, if gradent knows its geometry; else None, for Euclidean products, which is said."""
        if unwatchable(model) is not None:
            return None
        kind = sharding(model)
        obstacle = None if kind is None else f"the optimizer's state is sharded ({kind})."
        if obstacle is None:
            obstacle = metric_obstacle(optimizer, trainable(model))
        if obstacle is not None:
            self.notices.once(f"gradent records Euclidean products in the place of metric='adam': {obstacle}")
        return optimizer if obstacle is None else None

    def _prepare_account(self, model: nn.Module, optimizer: Any) -> None:
        """Settle which account the step gets: of the recorder, by source, or of the step as a whole."""
        assert self._recorder is not None
        is_split = optimizer is None or self._recorder.metric is not None or is_diagonal(optimizer)
        self._recorder.optimizer = optimizer if is_split else None
        if is_split:
            self._whole_step = None
            return
        budget = parse_budget(self._budget) or DEFAULT_BUDGET
        self._whole_step = self._whole_step or WholeStep(model, budget, self.notices.once)
        self._whole_step.begin()

    @guarded_event
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Settle a micro-batch, so that its graph goes."""
        if self._recorder is not None and self._recorder.armed:
            self._recorder.collect()

    @guarded_event
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Harvest, while the weights are still those that the gradients belong to."""
        # Called by the trainer, or, where an engine steps inside the backward, by its optimizer before.
        if self._recorder is None or not self._recorder.armed:
            return
        batches = self._recorder.collect()
        seen = self._division.find()
        divisor = seen if seen is not None else float(batches) if divides_loss() else 1.0
        self._loss_scale = _loss_scale(kwargs.get("optimizer"), self._engine_scale)
        self._pending = self._recorder.harvest(scale=max(1.0, divisor), loss_scale=self._loss_scale)
        if seen is None and batches > 1 and self._pending is not None:
            self.notices.once(
                "gradent did not see the loss that the trainer differentiates: d_w and d_l are of a loss that is "
                f"divided by {divisor:g}, as its configuration implies."
            )
        if (
            self._pending is not None
            and self._pending.attribution is not None
            and _keeps_loss_scale(kwargs["optimizer"])
        ):
            self.notices.once(
                "gradent gives no account of steps: gradients keep the loss scale (fp16) until the optimizer steps. "
                "Clip them (max_grad_norm), which unscales them, or train in bf16."
            )
            self._pending = _with_account(self._pending, None)
        self._recorder.disarm()
        if self._pending is None:
            return
        is_late = self._is_late()
        if self.realised and not is_late:
            self._logps_before = self._measure_logps(kwargs["model"], self._pending)
        is_due = self._is_tokens_step(state.global_step + 1) and is_first() and not is_late
        if (
            is_due
            and not self._is_sharded(kwargs["model"], "tokens_every")
            and self._has_pairs(self._pending)
            and not self._lacks_inputs(self._pending, "tokens_every")
        ):
            self._tokens = map_tokens(kwargs["model"], self._pending, self._budget)
        if self._has_proxies and not is_late and not self._lacks_inputs(self._pending, "proxies"):
            self._proxies = step_proxies(kwargs["model"], self._pending, self._budget, self.notices.once)
            seconds = 0.0 if self._proxies is None else sum(self._proxies.seconds.values())
            self._pending = replace(self._pending, overhead_s=self._pending.overhead_s + seconds)
        if self._whole_step is not None:
            self._hold(self._whole_step, self._pending, kwargs.get("optimizer"))

    def _is_sharded(self, model: nn.Module, name: str) -> bool:
        """Whether the model's parameters are spread over ranks, so that no pass can be made for this; that is said."""
        kind = sharding(model)
        if kind is not None:
            self.notices.once(f"{name} is not measured: a model sharded by {kind} allows no pass of gradent's own.")
        return kind is not None

    def _lacks_inputs(self, recording: Recording | RowRecording, name: str) -> bool:
        """Whether the model was given what a pass of gradent's own cannot give it; that is said."""
        if recording.further:
            self.notices.once(
                f"{name} is not measured: a pass of gradent's own gets tokens alone, while the model was given "
                f"{', '.join(recording.further)} too."
            )
        return bool(recording.further)

    def _is_late(self) -> bool:
        """Whether the weights have moved already, which leaves nothing but what was read off the backward."""
        assert self._recorder is not None
        if not self._recorder.has_moved:
            return False
        named = {"realised": self.realised, "tokens_every": self.tokens_every > 0, "proxies": self._has_proxies}
        asked = [name for name, is_asked in named.items() if is_asked]
        if asked:
            self.notices.once(
                f"gradent leaves out {', '.join(asked)}: this optimizer steps inside the backward (LOMO, layerwise "
                "GaLore and APOLLO), so that the weights have moved before they could be looked at. What was read off "
                "the backward is exact."
            )
        return True

    def _has_pairs(self, pending: Recording | RowRecording) -> TypeGuard[Recording]:
        """Whether a recording has token matrices; those of rows that are no pairs are `token_influence`'s."""
        if not isinstance(pending, Recording):
            self.notices.once("tokens_every: token matrices are of pairs; of groups, gradent.token_influence tells.")
        return isinstance(pending, Recording)

    def _hold(self, whole: WholeStep, pending: Recording | RowRecording, optimizer: object) -> None:
        """Get ready for a step that has no split, and say that it has none."""
        kind = describe_optimizer(optimizer)
        has_tokens = not isinstance(pending, Recording) or pending.batch is not None or not len(pending.gram)
        reason: str | None = "a reward model's total is not taken"
        if pending.further:
            reason = f"a pass of gradent's own gets tokens alone, without {', '.join(pending.further)}"
        elif has_tokens:
            reason = whole.hold()
        unknown = f"{kind} has no diagonal preconditioner that gradent knows (torch.optim.SGD, Adam and AdamW have one)"
        if reason is None:
            text = f"gradent does not split steps into sources, and gives their totals: {unknown}."
        else:
            text = f"gradent gives no account of steps: {unknown}, and {reason}."
        self.notices.once(text)

    @guarded_event
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Account for a step that has no split, along what it did."""
        if self._whole_step is None or self._pending is None:
            return
        account, seconds = self._whole_step.attribute(self._pending.batch, temperature=self._rows.temperature)
        if isinstance(account, str):
            self.notices.once(f"gradent gives no account of a step: {account}.")
        elif account is not None:
            overhead = self._pending.overhead_s + seconds
            self._pending = replace(_with_account(self._pending, account), overhead_s=overhead)

    def _measure_logps(self, model: nn.Module, recording: Recording | RowRecording) -> Tensor | None:
        """Log-probs of a recording's rows, float64 `[N]`; of pairs chosen, then rejected."""
        if self._is_sharded(model, "realised"):
            return None
        if recording.batch is None or self._lacks_inputs(recording, "realised"):
            return None
        dtypes = {part.dtype for part in trainable(model).values()} & {torch.float16, torch.bfloat16}
        if dtypes:
            self.notices.once(
                f"realised changes are differences of two forwards in {dtypes.pop()}, whose rounding can be larger "
                "than what a step changes; gradent/explained then tells of rounding. Weights in float32 show the step."
            )
        return row_logps(model, recording.batch, temperature=self._rows.temperature)

    def _is_tokens_step(self, step: int) -> bool:
        return self.tokens_every > 0 and (step == 1 or step % self.tokens_every == 0)

    @guarded_event
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what was harvested, with the pairs of all ranks."""
        self._release_step()
        if self._is_measuring:
            optimizer = kwargs.get("optimizer")
            scale = _loss_scale(optimizer, engine_loss_scale(optimizer))
            self._keep_step(state, kwargs["model"], was_skipped=self._loss_scale > scale)
        if self._probe is None or self.errors >= LIMIT or not self._probe.is_due(state.global_step):
            return
        if not self._is_sharded(kwargs["model"], "probe_data"):
            self._scalars |= self._probe.measure(kwargs["model"], self._budget)

    def _keep_step(self, state: Any, model: nn.Module, *, was_skipped: bool) -> None:
        """Make the step's record of what all ranks harvested."""
        pending, self._pending, self._is_measuring = self._pending, None, False
        change = None
        if pending is not None and was_skipped:
            self.notices.once(
                "a step was skipped by the loss scaler (fp16): nothing was realised in it, it has no account, and the "
                "gradients that were measured are those of its weights."
            )
            pending, self._logps_before = _with_account(pending, None), None
        try:
            if pending is not None and self._logps_before is not None:
                logps = self._measure_logps(model, pending)
                change = None if logps is None else logps - self._logps_before
        finally:  # the other ranks wait here, whatever happened on this one
            gathered = gather((pending, change, self._proxies))
        recordings = same_kind([part for part, _, _ in gathered if part is not None], self.notices.once)
        if not recordings:
            return
        is_new = self._journal is None
        self._journal = self._journal or self._make_journal(recordings[0])
        realised = [change for part, change, _ in gathered if part is not None and change is not None]
        changes = realised if len(realised) == len(recordings) else None
        record = self._journal.record(state.global_step, recordings, changes, self._tokens)
        if isinstance(record, StepRecord):
            record = self._unseen.judge(record, state.epoch)
            record = replace(record, proxies=join_proxies([found for part, _, found in gathered if part is not None]))
        self.records.append(record if self.by_module else record.without_modules())
        self._attempt += 1
        if len(self.records) > KEPT_MATRICES:
            self.records[-KEPT_MATRICES - 1] = self.records[-KEPT_MATRICES - 1].without_large_matrices()
        self._window.append(record)
        self._journal.append(record, out=self._out if is_new else None)

    def _make_journal(self, recording: Recording | RowRecording) -> Journal:
        """What becomes of the run's measured steps, by the kind of the first."""
        if isinstance(recording, RowRecording):
            return GroupJournal(self._alert, panels=self._has_panels)
        return PairJournal(self._alert, panels=self._has_panels, by_module=self.by_module)

    @guarded_event
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the window's scalars to the logs, in time for the loggers behind this callback."""
        if logs is None or not is_first() or self.errors >= LIMIT:
            return
        if any(key.startswith(("eval_", "test_")) for key in logs):
            return
        scalars, self._scalars = self._scalars, {}
        records, self._window = self._window, []
        if records and self._journal is not None:
            scalars |= self._journal.summarize(records)
        if not scalars:
            return
        journal = self._journal
        shown = self._shown.choose(scalars, has_figures=journal is not None and journal.has_figures)
        logs.update(shown)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(scalars)
        if records and journal is not None:
            unsent = {} if has_logger("WandbCallback") else {str(name): value for name, value in shown.items()}
            alert = journal.tell(records, unsent, state, kwargs.get("processing_class"))
            if alert is not None:
                log(alert)

    @guarded_event
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the records, and say what the run came to."""
        is_watched = self._recorder is not None
        closing = None if self._journal is None else self._journal.finish()
        self.leave()
        self._close_journal()
        if is_watched and is_first():
            log(closing or "gradent: no step was measured in this run.", name="gradent.run")

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def step_aside(self) -> None:
        """Take every hook off the model."""
        self._whole_step = None
        self._division.step_aside()
        if self._recorder is not None:
            self._recorder.disarm()
            self._recorder.optimizer = None

    def leave(self) -> None:
        """Take everything off model, optimizer and trainer."""
        self.step_aside()
        self._release_step()

    def _forget_attempt(self, step: int) -> None:
        """Drop what was recorded after a step by a training that was broken off and starts again (smaller batches)."""
        assert self._journal is not None
        kept = self._attempt
        while self._attempt and self.records and self.records[-1].step > step:
            self.records.pop()
            self._attempt -= 1
        if kept and not self._attempt:
            self._journal.rewind()

    def _release_step(self) -> None:
        if self._take_off is not None:
            self._take_off()
            self._take_off = None
        # Between steps alone: the hook itself runs while its optimizer walks its list of them.
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None


def _loss_scale(optimizer: Any, engine_scale: float = 1.0) -> float:
    """What a gradient scaler multiplies the loss by; it falls where the scaler keeps the optimizer from its step."""
    scaler = getattr(optimizer, "scaler", None)  # accelerate's `step_was_skipped` misses some
    return float(scaler.get_scale()) if scaler is not None else engine_scale


def _keeps_loss_scale(optimizer: Any) -> bool:
    """Whether a gradient scaler has not divided its scale out of the gradients yet."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return False
    inner = getattr(optimizer, "optimizer", optimizer)
    return bool(scaler._per_optimizer_states[id(inner)]["stage"].name == "READY")  # noqa: SLF001  (no public name)


def _with_account(recording: Recording | RowRecording, account: StepAttribution | None) -> Recording | RowRecording:
    """The recording with another account, or none."""
    if isinstance(recording, RowRecording):
        return with_account(recording, account)
    return replace(recording, attribution=account)
