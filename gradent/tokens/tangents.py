"""Every completion token's effect along a given vector: by forward mode, and where torch cannot, token by token.

Letters: T completion tokens of a row, L tokens of a row, V vocabulary, v the direction.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradent import notices
from gradent.errors import NonFiniteError
from gradent.kernels.common.numerics import accumulator, spans
from gradent.model.autograd import row_gradients, with_parameters
from gradent.model.calls import forward_logits, forward_marked
from gradent.model.facts import computing_dtypes, facts, tolerance, trims
from gradent.model.logprobs import TILE, check_rows
from gradent.model.parameters import input_device
from gradent.tokens.directions import dot
from gradent.tokens.forward_mode import push, split

__all__ = ["Differentiator", "Direction", "ExpectedSum", "Row"]

Row = tuple[Tensor, Tensor]
"""Token ids, int64 `[L]`, and which of them are marked, bool `[L]`."""


class ExpectedSum(NamedTuple):
    """What backward passes say of two rows' effects: `a · Σ first + b · Σ second = value`, up to rounding."""

    first: float
    second: float
    value: float
    scale: float


@dataclass(frozen=True)
class Direction:
    """v by parameter, its norm, and what is known of the effects along it."""

    vector: Mapping[str, Tensor]
    norm: float
    expected: ExpectedSum | None = None


class Differentiator:
    """Effects of a few rows' tokens, by forward mode until it fails on the model, token by token from then on."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], *, inside: Collection[torch.dtype] = (),
        caller: str = "token_effects",
    ) -> None:  # fmt: skip
        """`inside` are the dtypes of autocast inside the model's own forward; `caller` is named in warnings."""
        self._model, self._parameters, self._caller = model, parameters, caller
        self.can_push = True
        dtypes = computing_dtypes(model, input_device(model)).union(inside)
        self._limit = tolerance("forward mode", dtypes)
        self._range = 0 if torch.float16 in dtypes else 32

    # Of the first call's rows there must be two: on them is tried whether rows of one forward leave each other alone.
    def __call__(self, rows: Sequence[Row], names: int | Sequence[str], direction: Direction) -> list[Tensor]:
        """Effects along v of rows with these names, or of a pair of this number: float64 `[T]` each, on the CPU."""
        if isinstance(names, int):
            names = [f"pair {names}, {side}" for side in ("chosen", "rejected")]
        # A long or short vector would leave the range of a narrow exponent on its way.
        exponent = math.frexp(direction.norm)[1]
        exponent = exponent if abs(exponent) > self._range else 0
        vector = {
            name: (part if exponent == 0 else part * 2.0**-exponent).to(self._parameters[name].dtype)
            for name, part in direction.vector.items()
        }
        effects: list[Tensor] = []
        failure = ""
        if self.can_push:
            effects, failure = self._by_forward_mode(rows, names, direction, vector, exponent)
        if failure:
            self.can_push = False
            self.announce(failure)
        if not self.can_push:
            effects = self.without_forward_mode(rows, direction.vector)
        for name, part in zip(names, effects, strict=True):
            if not bool(torch.isfinite(part).all()):
                raise NonFiniteError(
                    f"non-finite effect: {name} has a token whose effect is nan or inf, though its log-prob is finite. "
                    "Try a wider dtype (bfloat16 or float32 instead of float16)."
                )
        return effects

    def announce(self, failure: str) -> None:
        """Say why forward mode is left."""
        notices.warn(
            f"gradent.{self._caller} cannot differentiate this model in forward mode, and goes on with one backward "
            f"pass a token (as exact, but slower by the number of tokens): {failure}",
            stacklevel=5,
        )

    def without_forward_mode(self, rows: Sequence[Row], vector: Mapping[str, Tensor]) -> list[Tensor]:
        """Effects of each row, float64 `[T]`, where forward mode fails."""
        return [self._token_by_token(row, vector) for row in rows]

    def can_trim(self, ids: Tensor) -> bool:
        """Whether logits before the response may be left out for ids `[L]`; False before the model's first pair."""
        return bool(facts(self._model).shares_tangents) and trims(self._model, ids)

    def _by_forward_mode(
        self,
        rows: Sequence[Row],
        names: Sequence[str],
        direction: Direction,
        vector: Mapping[str, Tensor],
        exponent: int,
    ) -> tuple[list[Tensor], str]:
        """The effects along `vector · 2^exponent`, or why there are none."""

        def attempt(*, is_padded: bool) -> tuple[list[Tensor], str]:
            effects, failure = self._push(rows, names, vector, is_padded=is_padded)
            effects = [part * 2.0**exponent for part in effects]
            return effects, failure or self._contradiction(effects, direction.expected)

        known = facts(self._model)
        was_tried = known.shares_tangents is not None
        if known.shares_tangents:
            effects, failure = attempt(is_padded=True)
            if not failure:
                return effects, ""
            known.shares_tangents = False  # the model changed since it was tried
        effects, failure = attempt(is_padded=False)
        if failure or was_tried:
            return effects, failure
        padded, failure = attempt(is_padded=True)
        known.shares_tangents = False
        if not failure:
            apart = max(float((left - right).abs().max()) for left, right in zip(padded, effects, strict=True))
            known.shares_tangents = apart <= self._limit * max(float(part.abs().max()) for part in effects)
        return (padded if known.shares_tangents else effects), ""

    def _push(
        self, rows: Sequence[Row], names: Sequence[str], vector: Mapping[str, Tensor], *, is_padded: bool
    ) -> tuple[list[Tensor], str]:
        """The effects along `vector`, or why there are none."""
        forward = partial(_forward, rows=rows, is_padded=is_padded, trim=is_padded and trims(self._model, rows[0][0]))
        try:
            results = push(lambda values: with_parameters(self._model, values, forward), self._parameters, vector)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            return [], f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        check_rows(torch.stack([logp for logp, _ in results]), names)
        return [effects for _, effects in results], ""

    def _contradiction(self, effects: Sequence[Tensor], expected: ExpectedSum | None) -> str:
        """How the effects differ from a backward pass; empty where they agree."""
        if not effects or not bool(torch.isfinite(torch.cat(list(effects))).all()):
            return "a token's effect is nan or inf there, though its log-prob is finite."
        if expected is None:
            return ""
        total = expected.first * float(effects[0].sum()) + expected.second * float(effects[-1].sum())
        error = abs(total - expected.value) / expected.scale if expected.scale else abs(total)
        if error <= self._limit:
            return ""
        return f"it differs from a backward pass by {error:.1e} (a row's sum, scaled)."

    def _token_by_token(self, row: Row, vector: Mapping[str, Tensor]) -> Tensor:
        """The effects of a row's tokens by one backward a token, float64 `[T]`."""
        ids, marks = row
        moving = {name: parameter for name, parameter in self._parameters.items() if name in vector}
        logits = forward_logits(self._model, ids[None])[0]
        effects = []
        for position in marks.nonzero()[:, 0].tolist():
            scores = logits[position - 1].to(accumulator(logits.dtype))
            logp = scores.log_softmax(-1)[ids[position]]
            grads = row_gradients(logp, list(moving.values()), keep_graph=True) if moving else []
            gradient = {name: grad for name, grad in zip(moving, grads, strict=True) if grad is not None}
            effects.append(sum(dot(gradient, vector).values()))
        return torch.tensor(effects, dtype=torch.float64)


def _forward(model: nn.Module, rows: Sequence[Row], *, is_padded: bool, trim: bool) -> list[tuple[Tensor, Tensor]]:
    """Log-prob and effects of each row, one row a forward, or all in one padded forward."""
    if not is_padded:
        return [_row_tangents(forward_logits(model, ids[None])[0], ids, marks) for ids, marks in rows]
    ids, marks = (nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True))
    return [_row_tangents(*row) for row in zip(*forward_marked(model, ids, marks, trim=trim), strict=True)]


def _row_tangents(logits: Tensor, ids: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """A row's log-prob and its tokens' tangents `dz_y - softmax(z)·dz`, `[T]`, from logits z `[L, V]` with dz."""
    z, dz = split(logits)
    positions = marks[1:].nonzero()[:, 0]
    wide = accumulator(logits.dtype)
    total = torch.zeros((), dtype=torch.float64)
    tangents = torch.zeros(len(positions), dtype=torch.float64)
    for span in spans(len(positions), max(1, TILE // (3 * logits.shape[-1] * wide.itemsize))):
        at = positions[span]
        targets = ids[at + 1][:, None]
        scores = z[at].to(wide).log_softmax(-1)
        total += scores.gather(1, targets).double().sum().cpu()
        if dz is not None:
            moved = dz[at].to(wide)
            # Against the token's own tangent: what all logits share cancels before it is summed.
            moved -= moved.gather(1, targets)
            tangents[span] = -(moved * scores.exp_()).sum(-1).double().cpu()
    return total.detach(), tangents.detach()
