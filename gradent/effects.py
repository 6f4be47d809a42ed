"""What a small step does to every token: `token_effects`.

`⟨∇_θ log π(y^a), v⟩` of all tokens at once is the derivative of their log-probs along v: one forward that carries
tangents, whatever the number of tokens. A backward pass checks it.

Letters: B pairs, T completion tokens of a row, L tokens of a row, V vocabulary, v the direction.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradent.directions import OWN, check_toward, dot, given_vector, planned_step
from gradent.errors import GradentWarning, InputError, ModelError, NonFiniteError
from gradent.forward_mode import push, split
from gradent.hooks.logprob import TILE, check_logps, sequence_logprobs
from gradent.kernels.reference import accumulator, spans
from gradent.model import check_causal, check_ids, forward_logits, input_device, observed, plain, trainable
from gradent.pairs import PairBatch
from gradent.per_sample import parameters_kept

__all__ = ["token_effects"]

Row = tuple[Tensor, Tensor]

# Scaled difference between the two ways to differentiate beyond which one of them is wrong. Rounding stays far below.
_AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-4}
_AGREEMENT_NARROW = 0.2

_CAUSAL: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def token_effects(
    model: nn.Module,
    batch: PairBatch,
    toward: str | Mapping[str, Tensor] | Tensor = "rejected",
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Tensor:
    """How far a step along v moves the log-prob of every completion token, to first order: `⟨∇log π(y^a), v⟩`.

    Exact, by forward-mode differentiation, whatever the number of tokens: "rejected" and "chosen" cost about one and a
    half times a pair's two forward and backward passes, "margin" about two times, "step" and a vector about once a pair
    and half of it a call. A backward pass of every pair (of the first one, if v is the same for all) checks the sum
    over a row; where they differ, or torch has no forward derivative of the model, every token has a backward of its
    own, with a warning. The model is left as it was, as by `measure`.

    Args:
        model: a causal language model, as in `measure`; in eval mode meanwhile.
        batch: B preference pairs.
        toward: what v is. "rejected": `g_l = ∇log π(y_l|x)` of the token's own pair: over chosen tokens the effects sum
            to the pair's `inner`, over rejected ones to `rejected_sq`. "chosen": `g_w`. "margin": `g_w - g_l`, the
            paper's Theorem 3 token by token. "step": what `optimizer.step()` would add to the parameters now. Or a
            vector of the user's: `{parameter name: tensor of its shape}`, names left out being zero, or one flat
            tensor over the trainable parameters in `named_parameters` order.
        optimizer: for "step": an optimizer over the model's parameters, whose `.grad`s are as its step would find them
            (clipped and unscaled, if they are to be). A copy of it is stepped.

    Returns:
        float64 `[T]` on the CPU, T the marked tokens of all rows, in the order of
        `batch.input_ids[batch.completion_mask.bool()]`; `PairBatch.split_tokens` gives each pair its own. In nats (for
        "step": by that step; otherwise a unit of v).

    Raises:
        InputError: an unknown `toward`, a vector or an optimizer that does not fit the model, no `.grad` to step from,
            or token ids outside the model's vocabulary.
        ModelError: nothing trainable, not a causal language model, no logits, or reentrant gradient checkpointing.
        NonFiniteError: a nan or inf in the logits, in a gradient, in the step or in an effect.

    Example:
        >>> effects = token_effects(model, batch)  # doctest: +SKIP
        >>> [chosen.sum() for chosen, _ in batch.split_tokens(effects)]  # doctest: +SKIP
    """
    model = plain(model)
    parameters = trainable(model)
    check_toward(toward, optimizer)
    half, device = len(batch), input_device(model)
    rows = [batch.row(index) for index in range(2 * half)]
    check_ids(model, torch.cat([ids for ids, _ in rows]))
    rows = [(ids.to(device), marks.to(device)) for ids, marks in rows]
    differentiate = _Differentiate(model, parameters)
    effects: list[Tensor] = [torch.empty(0)] * (2 * half)
    with torch.enable_grad(), observed(model):
        fixed = None if isinstance(toward, str) and toward in OWN else _fixed(toward, optimizer, parameters)
        if model not in _CAUSAL:  # found out once a model
            check_causal(model, rows[0][0])
            _CAUSAL.add(model)
        for pair in range(half):
            two = (rows[pair], rows[half + pair])
            if fixed is None:
                direction = _own(model, parameters, two, pair, str(toward))
            else:
                direction = fixed if pair else _checked(fixed, model, parameters, two)
            effects[pair], effects[half + pair] = differentiate(two, pair, direction)
    return torch.cat(effects)


class _Claim(NamedTuple):
    """What backward passes say of a pair's effects: `Σ chosen · a + Σ rejected · b = value`, up to rounding."""

    chosen: float
    rejected: float
    value: float
    scale: float


@dataclass(frozen=True)
class _Direction:
    """v by parameter, its norm, and what is known of the effects along it."""

    vector: Mapping[str, Tensor]
    norm: float
    claim: _Claim | None = None


def _own(model: nn.Module, parameters: Mapping[str, Tensor], two: Sequence[Row], pair: int, toward: str) -> _Direction:
    """The direction that is a pair's own."""
    if toward != "margin":
        chosen = toward == "chosen"
        vector, norm = _gradient(model, parameters, two[0 if chosen else 1], pair, chosen=chosen)
        return _Direction(vector, norm, _Claim(float(chosen), float(not chosen), norm**2, norm**2))
    vector, norm = _gradient(model, parameters, two[0], pair, chosen=True)
    taken, other = _gradient(model, parameters, two[1], pair, chosen=False)
    for name, part in taken.items():
        vector[name] = vector[name] - part if name in vector else -part
    square = sum(dot(vector, vector).values())
    return _Direction(vector, math.sqrt(square), _Claim(1.0, -1.0, square, (norm + other) * math.sqrt(square)))


def _fixed(
    toward: str | Mapping[str, Tensor] | Tensor, optimizer: object, parameters: Mapping[str, Tensor]
) -> _Direction:
    """The direction that is the same for all pairs."""
    if isinstance(toward, str):
        vector = planned_step(optimizer, parameters)
    else:
        vector = given_vector(toward, parameters)
    squares = dot(vector, vector)
    for name, square in squares.items():
        if math.isfinite(square):
            continue
        if isinstance(toward, str):
            raise NonFiniteError(
                f"non-finite step: {type(optimizer).__name__} would move {name!r} by a nan or an inf. Look for it in "
                "the parameter's .grad: a gradient scaler skips such a step."
            )
        raise InputError(
            f"token_effects: toward holds a nan or an inf for {name!r}, or its square overflows; every element must be "
            "finite. Find where the vector was made, or leave the parameter out."
        )
    moving = {name: part.to(parameters[name].device) for name, part in vector.items() if squares[name]}
    return _Direction(moving, math.sqrt(sum(squares.values())))


def _checked(
    direction: _Direction, model: nn.Module, parameters: Mapping[str, Tensor], two: Sequence[Row]
) -> _Direction:
    """The direction, with what a backward pass of the rejected row says of it."""
    gradient, norm = _gradient(model, parameters, two[1], 0, chosen=False)
    value = sum(dot(gradient, direction.vector).values())
    return replace(direction, claim=_Claim(0.0, 1.0, value, norm * direction.norm))


def _gradient(
    model: nn.Module, parameters: Mapping[str, Tensor], row: Row, pair: int, *, chosen: bool
) -> tuple[dict[str, Tensor], float]:
    """`∇_θ log π(y|x)` by parameter, those that have none left out, and its norm."""
    ids, marks = row
    logp = sequence_logprobs(forward_logits(model, ids[None]), ids[None], marks[None])
    check_logps(logp, [pair], [chosen])
    grads = _backward(logp.sum(), parameters, keep=False)
    squares = dot(grads, grads)
    for name, square in squares.items():
        if not math.isfinite(square):
            raise NonFiniteError(
                f"non-finite gradient: pair {pair}, {'chosen' if chosen else 'rejected'}, has a nan or inf in the "
                f"gradient of {name!r}. Try a wider dtype (bfloat16 or float32 instead of float16), or check the "
                "checkpoint for nan."
            )
    return grads, math.sqrt(sum(squares.values()))


def _backward(logp: Tensor, parameters: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
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


class _Differentiate:
    """Effects of a pair's tokens: by forward mode until it fails on the model, token by token from then on."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self._model, self._parameters = model, parameters
        self._forward = True
        device = input_device(model).type
        cast = {torch.get_autocast_dtype(device)} if torch.is_autocast_enabled(device) else set()
        dtypes = {parameter.dtype for parameter in model.parameters()} | cast
        self._limit = max(_AGREEMENT.get(dtype, _AGREEMENT_NARROW) for dtype in dtypes)
        self._range = 0 if torch.float16 in dtypes else 32

    def __call__(self, two: Sequence[Row], pair: int, direction: _Direction) -> list[Tensor]:
        """float64 `[T]` on the CPU, of the chosen and of the rejected row."""
        # A long or short vector would leave the range of a narrow exponent on its way.
        exponent = math.frexp(direction.norm)[1]
        exponent = exponent if abs(exponent) > self._range else 0
        vector = {
            name: (part if exponent == 0 else part * 2.0**-exponent).to(self._parameters[name].dtype)
            for name, part in direction.vector.items()
        }
        effects, failure = self._pushed(two, pair, vector) if self._forward else ([], "")
        effects = [part * 2.0**exponent for part in effects]
        if self._forward and not failure:
            failure = self._contradicted(effects, direction.claim)
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

    def _pushed(self, two: Sequence[Row], pair: int, vector: Mapping[str, Tensor]) -> tuple[list[Tensor], str]:
        """The effects along `vector` by forward mode, or why there are none."""
        rows = _Rows(self._model)

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

    def _contradicted(self, effects: Sequence[Tensor], claim: _Claim | None) -> str:
        """What a backward pass has against the effects; empty where it agrees."""
        if not bool(torch.isfinite(torch.cat(list(effects))).all()):
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
            effects.append(sum(dot(_backward(logp, moving, keep=True), vector).values()) if moving else 0.0)
        return torch.tensor(effects, dtype=torch.float64)


class _Rows(nn.Module):
    """The rows' log-probs and effects as a function of the model's parameters, for `functional_call` to swap them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
        """Log-prob and effects of each row, one row a forward."""
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
