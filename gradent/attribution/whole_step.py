"""The account of a step that has no split: its total, along the change that the optimizer made to the parameters.

`⟨g_i, Δθ⟩` of all responses is one forward that carries tangents, with the parameters as they were before the step, and
Δθ is what they are after it less that. Any optimizer will do; what in its step moved a response is not told.

Letters: N rows of a step; of k pairs, chosen, then rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradent.attribution.step import StepAttribution
from gradent.errors import GradentError
from gradent.hooks.overhead import Clock
from gradent.model.autograd import row_gradients, with_parameters
from gradent.model.calls import forward_marked, tempered
from gradent.model.facts import inner_dtypes, require_causal
from gradent.model.logprobs import sequence_logprobs
from gradent.model.observed import observed
from gradent.model.parameters import input_device, trainable, unwrap_compiled
from gradent.model.sharding import sharding
from gradent.model.weight_mark import WeightMark
from gradent.pairs.batch import PairBatch
from gradent.pairs.row_batch import RowBatch
from gradent.record import UNSPLIT
from gradent.tokens.directions import dot
from gradent.tokens.tangents import Differentiator, Direction, ExpectedSum, Row

__all__ = ["WholeStep"]


class WholeStep:
    """A model's trainable parameters around each measured step of its optimizer."""

    def __init__(self, model: nn.Module, budget: int, say: Callable[..., object]) -> None:
        """`budget` bytes may hold a copy of the parameters; `say` logs a text, one of each `key` once."""
        self._model, self._budget, self._say = unwrap_compiled(model), budget, say
        self._can_push = True
        self._inside: set[torch.dtype] | None = None
        self._mark: WeightMark | None = None
        self._before: dict[str, Tensor] = {}
        self._clock = Clock()

    def begin(self) -> None:
        """Expect a step whose backwards are still to come."""
        self._before = {}
        is_whole = sharding(self._model) is None
        self._mark = WeightMark(list(trainable(self._model).values())) if is_whole else None

    def hold(self) -> str | None:
        """Keep the parameters as they are before the step; why that is not done, None where it is."""
        kind = sharding(self._model)
        if kind is not None:
            return f"a model sharded by {kind} allows no pass of gradent's own"
        if self._mark is None or self._mark.has_moved():
            return "it steps inside the backward"
        parameters = trainable(self._model)
        size = sum(part.numel() * part.element_size() for part in parameters.values())
        if size > self._budget:
            return f"its total needs a copy of what is trained, {size} bytes: more than memory_budget={self._budget}"
        with self._clock:
            self._before = {name: part.detach().clone().requires_grad_() for name, part in parameters.items()}
        return None

    def attribute(
        self, batch: PairBatch | RowBatch | None, *, temperature: float = 1.0
    ) -> tuple[StepAttribution | str | None, float]:
        """The account of a batch's rows in the step that was taken, or why there is none, and the seconds it took."""
        before, self._before = self._before, {}
        if not before:  # the reason was given when the step came
            return None, 0.0
        with self._clock, tempered(temperature):
            try:
                account: StepAttribution | str = self._attribute(batch, before)
            except GradentError as error:  # the step's record is not to be lost with its account
                account = f"{type(error).__name__}: {error}"
        return account, self._clock.take()

    def _attribute(self, batch: PairBatch | RowBatch | None, before: Mapping[str, Tensor]) -> StepAttribution | str:
        after = trainable(self._model)
        if list(after) != list(before):
            return "other parameters are trainable after it than before it"
        # In the parameters' own dtype, in which the difference of two that lie near is exact.
        step = {name: part.detach() - before[name].detach() for name, part in after.items()}
        squares = dot(step, step)
        if not all(math.isfinite(square) for square in squares.values()):
            return "it moves a parameter by a nan or an inf"
        moving = {name: part for name, part in step.items() if squares[name]}
        total = self._push(batch, before, Direction(moving, math.sqrt(sum(squares.values()))))
        nothing = torch.full((len(total), len(total)), float("nan"), dtype=torch.float64)
        sides = 1 if isinstance(batch, RowBatch) else 2
        return StepAttribution(products=nothing, pushes=nothing.clone(), moved={UNSPLIT: total}, sides=sides)

    def _push(self, batch: PairBatch | RowBatch | None, before: Mapping[str, Tensor], direction: Direction) -> Tensor:
        """`⟨g_i, Δθ⟩` of all rows, float64 `[N]` on the CPU."""
        device, count = input_device(self._model), 0 if batch is None else len(batch.input_ids)
        total = torch.zeros(count, dtype=torch.float64)
        if batch is None or not direction.vector:
            return total
        rows = [batch.row(row) for row in range(count)]
        # Rows of one prompt together, of about one length.
        couples = [[row, row + count // 2] for row in range(count // 2)] + ([[count - 1]] if count % 2 else [])
        rows = [(ids.to(device), marks.to(device)) for ids, marks in rows]
        with torch.enable_grad(), observed(self._model):
            require_causal(self._model, rows[0][0])
            if self._inside is None:
                self._inside = inner_dtypes(self._model, rows[0][0])
            differentiator = _RowDifferentiator(
                self._model, before, self._say, can_push=self._can_push, inside=self._inside
            )
            if self._can_push:
                direction = differentiator.with_check(rows[couples[0][-1]], direction)
            for number, couple in enumerate(couples):
                effects = differentiator([rows[row] for row in couple], number, direction)
                total[couple] = torch.stack([part.sum() for part in effects]).to(total)
                direction = replace(direction, expected=None)
        self._can_push = differentiator.can_push
        return total


class _RowDifferentiator(Differentiator):
    """Effects along a step, of whole rows where forward mode fails: by one backward each."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], say: Callable[..., object],
        *, can_push: bool, inside: Collection[torch.dtype],
    ) -> None:  # fmt: skip
        super().__init__(model, parameters, inside=inside)
        self._say, self.can_push = say, can_push

    def with_check(self, row: Row, direction: Direction) -> Direction:
        """The direction, with what a backward pass of a couple's last row says of its effects."""
        value, norm = self._by_backward(row, direction.vector)
        return Direction(direction.vector, direction.norm, ExpectedSum(0.0, 1.0, value, norm * direction.norm))

    def announce(self, failure: str) -> None:
        """Say why forward mode is left."""
        self._say(
            "gradent cannot differentiate this model in forward mode, and takes the total of a step by one backward "
            f"pass a response (as exact, but slower): {failure}",
            key="forward mode",
        )

    def without_forward_mode(self, rows: Sequence[Row], vector: Mapping[str, Tensor]) -> list[Tensor]:
        """The sum of each row's effects, float64 `[1]`."""
        return [torch.tensor([self._by_backward(row, vector)[0]], dtype=torch.float64) for row in rows]

    def _by_backward(self, row: Row, vector: Mapping[str, Tensor]) -> tuple[float, float]:
        """`⟨∇ log π(y|x), v⟩` of a row, and the gradient's norm."""
        ids, marks = row

        def forward(model: nn.Module) -> Tensor:
            return sequence_logprobs(*forward_marked(model, ids[None], marks[None], trim=False))

        logp = with_parameters(self._model, self._parameters, forward)
        gradients = row_gradients(logp.sum(), list(self._parameters.values()))
        grads = {name: grad for name, grad in zip(self._parameters, gradients, strict=True) if grad is not None}
        return sum(dot(grads, vector).values()), math.sqrt(sum(dot(grads, grads).values()))
