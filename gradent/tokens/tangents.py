"""Every completion token's effect along a given vector: by forward mode, and where torch cannot, token by token.

Letters: T completion tokens of a row, L tokens of a row, V vocabulary, v the direction.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradent.errors import GradentWarning, ModelError, NonFiniteError
from gradent.hooks.passes.func_engine import parameters_kept
from gradent.kernels.common.numerics import accumulator, spans
from gradent.model.calls import forward_logits, forward_marked, input_device
from gradent.model.facts import trims
from gradent.model.logprobs import TILE, check_logps
from gradent.tokens.directions import dot
from gradent.tokens.forward_mode import push, split

__all__ = ["Claim", "Differentiate", "Direction", "Row", "backward"]

Row = tuple[Tensor, Tensor]

# Scaled difference between the two ways to differentiate beyond which one of them is wrong. Rounding stays far below.
_AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-4}
_AGREEMENT_NARROW = 0.2

# Whether a model's rows can share a padded forward, logits of prompts left out if it `trims`; found out on its first
# pair: trainable names -> the answer.
_TOGETHER: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], bool]] = weakref.WeakKeyDictionary()


class Claim(NamedTuple):
    """What backward passes say of a pair's effects: `Σ chosen · a + Σ rejected · b = value`, up to rounding."""

    chosen: float
    rejected: float
    value: float
    scale: float


@dataclass(frozen=True)
class Direction:
    """v by parameter, its norm, and what is known of the effects along it."""

    vector: Mapping[str, Tensor]
    norm: float
    claim: Claim | None = None


def backward(logp: Tensor, parameters: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gradients of a log-prob, and no more.

    Args:
        logp: the log-prob, a scalar.
        parameters: by name.
        keep: keep the graph for another.

    Returns:
        `{name: gradient}`, dense, of those that it depends on.

    Raises:
        ModelError: no graph, or reentrant gradient checkpointing.
        RuntimeError: what the backward raises otherwise.
    """
    if not logp.requires_grad:
        raise ModelError(
            "no trainable parameter reaches the logits: a log-prob has no graph. Reentrant gradient checkpointing "
            "behind a frozen embedding does this, and so does a forward under torch.no_grad(): switch it off."
        )
    try:
        grads = torch.autograd.grad(logp, list(parameters.values()), allow_unused=True, retain_graph=keep)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ModelError(
            "Reentrant gradient checkpointing allows no gradient of chosen parameters. Use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or switch checkpointing off meanwhile."
        ) from error
    return {
        name: grad.to_dense() if grad.is_sparse else grad
        for name, grad in zip(parameters, grads, strict=True)
        if grad is not None
    }


class Differentiate:
    """Effects of a pair's tokens: by forward mode until it fails on the model, token by token from then on.

    Args:
        model: the model, in eval mode.
        parameters: its trainable parameters by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self._model, self._parameters = model, parameters
        self._forward = True
        device = input_device(model).type
        cast = {torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set()
        dtypes = {parameter.dtype for parameter in model.parameters()} | cast
        self._limit = max(_AGREEMENT.get(dtype, _AGREEMENT_NARROW) for dtype in dtypes)
        self._range = 0 if torch.float16 in dtypes else 32

    def __call__(self, two: Sequence[Row], pair: int, direction: Direction) -> list[Tensor]:
        """The effects along a direction.

        Args:
            two: the pair's rows, chosen and rejected.
            pair: its number, as an error names it.
            direction: v.

        Returns:
            float64 `[T]` on the CPU, of the chosen and of the rejected row.

        Raises:
            NonFiniteError: a nan or inf in the logits or in an effect.
            ModelError: where tokens have a backward each, as `backward`.
        """
        # A long or short vector would leave the range of a narrow exponent on its way.
        exponent = math.frexp(direction.norm)[1]
        exponent = exponent if abs(exponent) > self._range else 0
        vector = {
            name: (part if exponent == 0 else part * 2.0**-exponent).to(self._parameters[name].dtype)
            for name, part in direction.vector.items()
        }
        effects, failure = self._by_forward_mode(two, pair, direction, vector, exponent) if self._forward else ([], "")
        if failure:
            self._forward = False
            warnings.warn(
                "gradent.token_effects cannot differentiate this model in forward mode, and goes on with one backward "
                f"pass a token (as exact, but slower by the number of tokens): {failure}",
                GradentWarning,
                stacklevel=3,
            )
        if not self._forward:
            effects = [self._token_by_token(row, direction.vector) for row in two]
        if not bool(torch.isfinite(torch.cat(effects)).all()):
            raise NonFiniteError(
                f"non-finite effect: pair {pair} has a token whose effect is nan or inf, though its log-prob is "
                "finite. Try a wider dtype (bfloat16 or float32 instead of float16)."
            )
        return effects

    def trim(self, ids: Tensor) -> bool:
        """Whether a row's logits may be left out before its response: a pair's effects were compared with and without.

        Args:
            ids: int64 `[L]`, the row.

        Returns:
            Whether they may; False before the model's first pair, and for models whose rows do not share a forward.
        """
        shared = _TOGETHER.get(self._model, {}).get(tuple(self._parameters), False)
        return shared and trims(self._model, ids)

    def _by_forward_mode(
        self, two: Sequence[Row], pair: int, direction: Direction, vector: Mapping[str, Tensor], exponent: int
    ) -> tuple[list[Tensor], str]:
        """The effects along `vector · 2^exponent`, or why there are none."""

        def tried(*, together: bool) -> tuple[list[Tensor], str]:
            effects, failure = self._pushed(two, pair, vector, together=together)
            effects = [part * 2.0**exponent for part in effects]
            return effects, failure or self._contradicted(effects, direction.claim)

        known, key = _TOGETHER.setdefault(self._model, {}), tuple(self._parameters)
        if known.get(key):
            both, failure = tried(together=True)
            if not failure:
                return both, ""
            known[key] = False  # the model changed since it was tried
        alone, failure = tried(together=False)
        if failure or key in known:
            return alone, failure
        both, failure = tried(together=True)
        known[key] = not failure and self._alike(both, alone)
        return (both if known[key] else alone), ""

    def _alike(self, both: Sequence[Tensor], alone: Sequence[Tensor]) -> bool:
        """Whether the rows of one padded forward have the effects that each has in a forward of its own."""
        apart = max(float((one - other).abs().max()) for one, other in zip(both, alone, strict=True))
        return apart <= self._limit * max(float(one.abs().max()) for one in alone)

    def _pushed(
        self, two: Sequence[Row], pair: int, vector: Mapping[str, Tensor], *, together: bool
    ) -> tuple[list[Tensor], str]:
        """The effects along `vector`, or why there are none."""
        rows = _Rows(self._model, together=together, trim=together and trims(self._model, two[0][0]))

        def function(values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
            swapped = {f"model.{name}": value for name, value in values.items()}
            found: list[tuple[Tensor, Tensor]] = functional_call(rows, swapped, (two,))
            return found

        try:
            with parameters_kept(self._model):
                found = push(function, self._parameters, vector)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            return [], f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        check_logps(torch.stack([logp for logp, _ in found]), [pair, pair], [True, False])
        return [effects for _, effects in found], ""

    def _contradicted(self, effects: Sequence[Tensor], claim: Claim | None) -> str:
        """What a backward pass has against the effects; empty where it agrees."""
        if not effects or not bool(torch.isfinite(torch.cat(list(effects))).all()):
            return "a token's effect is nan or inf there, though its log-prob is finite."
        if claim is None:
            return ""
        total = claim.chosen * float(effects[0].sum()) + claim.rejected * float(effects[1].sum())
        error = abs(total - claim.value) / claim.scale if claim.scale else abs(total)
        if error <= self._limit:
            return ""
        return f"it differs from a backward pass by {error:.1e} (a row's sum, scaled)."

    def _token_by_token(self, row: Row, vector: Mapping[str, Tensor]) -> Tensor:
        """The same by one backward a token."""
        ids, marks = row
        moving = {name: parameter for name, parameter in self._parameters.items() if name in vector}
        logits = forward_logits(self._model, ids[None])[0]
        effects = []
        for position in marks.nonzero()[:, 0].tolist():
            scores = logits[position - 1].to(accumulator(logits.dtype))
            logp = scores.log_softmax(-1)[ids[position]]
            effects.append(sum(dot(backward(logp, moving, keep=True), vector).values()) if moving else 0.0)
        return torch.tensor(effects, dtype=torch.float64)


class _Rows(nn.Module):
    """The rows' log-probs and effects as a function of the model's parameters, for `functional_call` to swap them."""

    def __init__(self, model: nn.Module, *, together: bool, trim: bool) -> None:
        super().__init__()
        self.model, self.together, self.trim = model, together, trim

    def forward(self, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
        """Log-prob and effects of each row, one row a forward, or all `together` in a padded one."""
        if self.together:
            parts = zip(*rows, strict=True)
            ids, marks = (nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in parts)
            found = zip(*forward_marked(self.model, ids, marks, trim=self.trim), strict=True)
            return [_row_tangents(*row) for row in found]
        return [_row_tangents(forward_logits(self.model, ids[None])[0], ids, marks) for ids, marks in rows]


def _row_tangents(logits: Tensor, ids: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of a row, and the tangents of its marked tokens' log-probs: `dz_y - softmax(z)·dz` one position before.

    Args:
        logits: z with its tangent dz, `[L, V]`, any float dtype.
        ids: int64 `[L]`.
        marks: bool `[L]`.

    Returns:
        `(log-prob, tangents)`: float64 scalar and `[T]`, on the CPU.
    """
    z, dz = split(logits)
    positions = marks[1:].nonzero()[:, 0]
    wide = accumulator(logits.dtype)
    total = torch.zeros((), dtype=torch.float64)
    moved = torch.zeros(len(positions), dtype=torch.float64)
    for span in spans(len(positions), max(1, TILE // (3 * logits.shape[-1] * wide.itemsize))):
        at = positions[span]
        targets = ids[at + 1][:, None]
        scores = z[at].to(wide).log_softmax(-1)
        total += scores.gather(1, targets).double().sum().cpu()
        if dz is not None:
            tangent = dz[at].to(wide)
            # Against the token's own tangent: what all logits share cancels before it is summed.
            tangent -= tangent.gather(1, targets)
            moved[span] = -(tangent * scores.exp_()).sum(-1).double().cpu()
    return total.detach(), moved.detach()
