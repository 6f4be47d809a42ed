"""Measuring inside a training loop, without a trainer: `attach(model)` and `Recorder.harvest()`.

Letters: B pairs, k of them with a gradient on both sides.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from gradent.errors import InputError, ModelError
from gradent.hooks.piggyback.backward import mark_completions
from gradent.hooks.piggyback.pairing import Pairing
from gradent.hooks.piggyback.watcher import Passed, Piggyback
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.measurement import measure
from gradent.model.calls import is_sharded, plain, trainable
from gradent.model.preconditioner import metric_roots
from gradent.pair_gram import PairGram, sum_parameters
from gradent.pairs.batch import PairBatch
from gradent.theory.conditions import Verdict

__all__ = ["Mode", "Recorder", "Recording", "WeightGrad", "attach", "join_recordings"]

logger = logging.getLogger("gradent")

Mode = Literal["auto", "piggyback", "measure"]
WeightGrad = Literal["shared"]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What one harvest found.

    Attributes:
        gram: Gram entries of the k pairs with a gradient. For a reward model they are those of the reward, and
            `chosen_logp`, `rejected_logp` are rewards.
        verdict: with the trainer's own weights `d_w`, `d_l`, for a loss that is a mean over its pairs.
        source: "piggyback" (read off the trainer's backward) or "measure" (a pass of gradent's own).
        batch: the tokens of the k pairs, in the gram's order; None for a reward model.
        inactive: pairs that the loss does not move, on either side or both: counted, not averaged.
        unpaired: rows that found no partner.
        overhead_s: wall time that gradent took, in seconds.
    """

    gram: PairGram
    verdict: Verdict
    source: Literal["piggyback", "measure"]
    batch: PairBatch | None
    inactive: int
    unpaired: int
    overhead_s: float


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

    Returns:
        The recorder, which is a context manager.

    Raises:
        InputError: an unknown mode, pairing or weight_grad.

    Example:
        >>> with attach(model) as recorder:  # doctest: +SKIP
        ...     loss_of(model(**batch)).backward()
        ...     print(recorder.harvest().gram.cosine)
        ...     optimizer.step()
    """
    for name, value, accepted in (
        ("mode", mode, get_args(Mode)),
        ("pairing", pairing, get_args(Pairing)),
        ("weight_grad", weight_grad, (None, *get_args(WeightGrad))),
    ):
        if value not in accepted:
            raise InputError(f"attach: {name}={value!r} is unknown; accepted are {', '.join(map(repr, accepted))}.")
    return Recorder(
        model,
        mode=mode,
        pairing=pairing,
        by_module=by_module,
        memory_budget=memory_budget,
        metric=metric,
        compiled=compiled,
        trusted=trusted,
        weight_grad=weight_grad,
    )


class Recorder:
    """Watches a model between `arm` and `disarm`, and gives what the backwards told when asked. Made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: Mode,
        pairing: Pairing,
        by_module: bool,
        memory_budget: int | str | None,
        metric: torch.optim.Optimizer | None,
        compiled: nn.Module | None,
        trusted: bool,
        weight_grad: WeightGrad | None,
    ) -> None:
        self.metric = metric
        self._model = plain(model)
        self._watched = model if compiled is None else compiled
        self._compiled = self._watched is not self._model
        self._trusted = trusted
        self._share = weight_grad is not None
        self._mode: Mode = mode
        self._pairing: Pairing = pairing
        self._by_module = by_module
        self._budget = parse_budget(memory_budget)
        self._piggyback: Piggyback | None = None
        self._parameters: Mapping[str, Tensor] = {}
        self._said: set[str] = set()
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
        self._parameters = trainable(self._model, sharded=True)
        if self.metric is not None and is_sharded(self._model):
            raise ModelError("metric: the optimizer's state is sharded (FSDP); only metric=None is available there.")
        self._piggyback = Piggyback(
            self._watched,
            self._parameters,
            budget=self._budget or DEFAULT_BUDGET,
            pairing=self._pairing,
            weight=None if self.metric is None else metric_roots(self.metric, self._parameters),
            entries=self._mode != "measure" and not self._compiled,
            trusted=self._trusted,
            share=self._share,
        )
        self._piggyback.arm()

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
        self._backwards = 0

    def harvest(self, *, scale: float = 1.0) -> Recording | None:
        """What the backwards since the last call told. Call it before `optimizer.step()`.

        Args:
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
        return join_recordings(recordings, scale=scale) if recordings else None

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
        try:
            for passed in self._piggyback.take():
                self._backwards += 1
                one = self._settle(passed)
                if one is not None:
                    self._collected.append(replace(one, overhead_s=self._piggyback.clock.take()))
        except Exception:
            self._collected, self._backwards = [], 0  # half a step is none
            raise
        return self._backwards

    def _settle(self, passed: Passed) -> Recording | None:
        assert self._piggyback is not None
        if passed.broken is not None:
            self._say(f"gradent cannot read this step: {passed.broken}.")
            return None
        with self._piggyback.clock:
            if not passed.constant and not mark_completions(passed):
                self._say(
                    "gradent cannot read this step: the loss weighs prompts too, so responses cannot be told apart."
                )
                return None
            pairs = len(passed.c) // 2
            moved = (passed.c[:pairs] != 0) & (passed.c[pairs:] != 0)
            active = [pair for pair in moved.nonzero()[:, 0].tolist() if passed.reward or self._differs(passed, pair)]
            batch = None if passed.reward else _batch(passed, active)
            own = self._mode == "measure" or passed.problem is not None or self._compiled
            own = own and bool(active)
            if own:
                gram = self._measure(passed, batch)
                self._compare(gram, passed, active)
            else:
                gram = self._read(passed).select(active)
            if self._share and active and not passed.shared:
                self._say(
                    "gradent: weight_grad='shared' found no weight gradient to share here, and the products are formed "
                    "twice. It takes matrices used once a forward, chosen and rejected in one forward, a loss whose "
                    "entries can be read off its backward, and no FSDP, torch.compile, reentrant checkpointing or "
                    "offloaded activations."
                )
            rows = len(passed.c) + passed.unpaired if self._pairing == "signs" else pairs
            c = passed.c * rows
            judged = Verdict.from_weights(gram, -c[:pairs][active], c[pairs:][active])
        return Recording(
            gram=gram,
            verdict=judged,
            source="measure" if own else "piggyback",
            batch=batch,
            inactive=pairs - len(active),
            unpaired=passed.unpaired,
            overhead_s=0.0,
        )

    def _differs(self, passed: Passed, pair: int) -> bool:
        """Whether a pair's two rows are two; one and the same response is neither chosen nor rejected."""
        (chosen, of_w), (rejected, of_l) = passed.rows[pair], passed.rows[len(passed.rows) // 2 + pair]
        same = torch.equal(chosen, rejected) and torch.equal(of_w, of_l)
        if same:
            self._say("gradent leaves out pairs of the batch whose chosen equals rejected; see `inactive`.")
        return not same

    def _measure(self, passed: Passed, batch: PairBatch | None) -> PairGram:
        reason = "the model is compiled" if self._compiled else passed.problem
        if is_sharded(self._model):
            raise ModelError(
                f"the entries cannot be read off the trainer's backward ({reason}), and a sharded model (FSDP) allows "
                "no pass of gradent's own: its ranks would wait for one another."
            )
        if self._mode == "piggyback" or batch is None:
            why = "of a reward model " if batch is None else ""
            raise ModelError(
                f"the entries {why}cannot be read off the trainer's backward: {reason}. "
                + ("gradent has no pass of its own for it." if batch is None else "Use mode='auto' or 'measure'.")
            )
        if self._mode == "auto":
            self._say(
                f"gradent measures in a forward and a backward of its own (as exact, but not free): {reason}. "
                "mode='measure' says that this is meant."
            )
        return measure(self._model, batch, by_module=self._by_module, memory_budget=self._budget, metric=self.metric)

    def _compare(self, gram: PairGram, passed: Passed, active: Sequence[int]) -> None:
        """Say so where gradent's own pass sees another function than the trainer's forward did."""
        if not passed.constant:
            return  # the trainer's log-probs were summed over other tokens
        pairs = len(passed.logps) // 2
        seen = torch.cat([passed.logps[:pairs][active], passed.logps[pairs:][active]])
        own = torch.cat([gram.chosen_logp, gram.rejected_logp])
        if bool(((seen - own).abs() > 0.02 * seen.abs().clamp_min(1.0)).any()):
            self._say(
                "gradent's own pass sees other log-probs than the trainer's forward: it has no dropout and no padding, "
                "and of the model's inputs it gets input_ids alone (no position_ids). The entries are its own."
            )

    def _read(self, passed: Passed) -> PairGram:
        """The `PairGram` of entries that were read off the backward."""
        names, pairs = list(self._parameters), len(passed.c) // 2
        modules = sum_parameters(names, [(range(pairs), passed.entries)], pairs)
        totals = sum(modules.values(), torch.zeros(3, pairs, dtype=torch.float64))
        lengths = torch.tensor([int(marks.sum()) for _, marks in passed.rows], dtype=torch.int64)
        return PairGram(
            chosen_sq=totals[0],
            rejected_sq=totals[1],
            inner=totals[2],
            chosen_logp=passed.logps[:pairs],
            rejected_logp=passed.logps[pairs:],
            chosen_len=lengths[:pairs],
            rejected_len=lengths[pairs:],
            modules={name: (part[0], part[1], part[2]) for name, part in modules.items()} if self._by_module else None,
        )

    def _say(self, text: str) -> None:
        """Log a line, once: figures in it, which differ from step to step, do not make it another one."""
        what = re.sub(r"[\d.]+(e[+-]?\d+)?", "", text)
        if what not in self._said:
            self._said.add(what)
            logger.warning(text)


def _batch(passed: Passed, active: Sequence[int]) -> PairBatch | None:
    pairs = len(passed.rows) // 2
    rows = [*(passed.rows[pair] for pair in active), *(passed.rows[pairs + pair] for pair in active)]
    return PairBatch.from_rows([(ids, marks) for ids, marks in rows]) if rows else None


def join_recordings(recordings: Sequence[Recording], *, scale: float = 1.0) -> Recording:
    """Several recordings of one step (micro-batches, ranks) as one.

    Args:
        recordings: at least one.
        scale: of the weights `d_w` and `d_l`.

    Returns:
        The recording of all their pairs.
    """
    gram = PairGram.join([one.gram for one in recordings])
    d_w, d_l = (torch.cat([getattr(one.verdict, name) for one in recordings]) * scale for name in ("d_w", "d_l"))
    batches = [one.batch for one in recordings if one.batch is not None]
    return Recording(
        gram=gram,
        verdict=Verdict.from_weights(gram, d_w, d_l),
        source="measure" if any(one.source == "measure" for one in recordings) else "piggyback",
        batch=PairBatch.join(batches) if batches else None,
        inactive=sum(one.inactive for one in recordings),
        unpaired=sum(one.unpaired for one in recordings),
        overhead_s=sum(one.overhead_s for one in recordings),
    )
