"""What a small step does to every token: `token_effects`.

`⟨∇_θ log π(y^a), v⟩` of all tokens at once is the derivative of their log-probs along v: one forward that carries
tangents, whatever the number of tokens. A backward pass checks it.

Letters: B pairs, T completion tokens of a row, L tokens of a row, V vocabulary, v the direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradent.errors import InputError, NonFiniteError
from gradent.model.facts import require_causal
from gradent.model.observed import observed
from gradent.model.parameters import check_ids, input_device, trainable, unwrap_compiled
from gradent.pairs.batch import PairBatch, not_a_batch
from gradent.tokens.directions import OWN, check_toward, dot, given_vector, planned_step, row_gradient
from gradent.tokens.tangents import Differentiator, Direction, ExpectedSum, Row

__all__ = ["token_effects"]


def token_effects(
    model: nn.Module,
    batch: PairBatch,
    toward: str | Mapping[str, Tensor] | Tensor = "rejected",
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Tensor:
    """How far a step along v moves the log-prob of every completion token, to first order: `⟨∇log π(y^a), v⟩`.

    Exact, by forward-mode differentiation, whatever the number of tokens. In units of a pair's two forward and backward
    passes, "rejected" and "chosen" cost about 1.5, "margin" about 2, "step" and a vector about 1 (and 0.5 a call). A
    backward pass of every pair (of the first one, if v is the same for all) checks the sum over a row. Where the two
    differ, or torch has no forward derivative of the model, every token has a backward of its own, with a warning. The
    model is left as it was, as by `measure`.

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
    if not isinstance(batch, PairBatch):
        raise InputError(not_a_batch("token_effects", batch, "PairBatch"))
    model = unwrap_compiled(model)
    parameters = trainable(model)
    check_toward(toward, optimizer)
    half, device = len(batch), input_device(model)
    rows = [batch.row(index) for index in range(2 * half)]
    check_ids(model, torch.cat([ids for ids, _ in rows]))
    rows = [(ids.to(device), marks.to(device)) for ids, marks in rows]
    differentiator = Differentiator(model, parameters)
    effects: list[Tensor] = [torch.empty(0)] * (2 * half)
    with torch.enable_grad(), observed(model):
        fixed = None if isinstance(toward, str) and toward in OWN else _shared_direction(toward, optimizer, parameters)
        require_causal(model, rows[0][0])
        for pair in range(half):
            sides = (rows[pair], rows[half + pair])
            trim = differentiator.can_trim(sides[0][0])
            if fixed is None:
                direction = _pair_direction(model, parameters, sides, pair, str(toward), trim=trim)
            else:
                direction = fixed if pair else _with_expected_sum(fixed, model, parameters, sides, trim=trim)
            effects[pair], effects[half + pair] = differentiator(sides, pair, direction)
    return torch.cat(effects)


def _pair_direction(
    model: nn.Module, parameters: Mapping[str, Tensor], sides: Sequence[Row], pair: int, toward: str, *, trim: bool
) -> Direction:
    """The gradient of the pair's own log-prob or margin."""
    if toward != "margin":
        chosen = toward == "chosen"
        row = sides[0 if chosen else 1]
        vector, norm = row_gradient(model, parameters, row, f"pair {pair}, {toward}", trim=trim)
        return Direction(vector, norm, ExpectedSum(float(chosen), float(not chosen), norm**2, norm**2))
    vector, chosen_norm = row_gradient(model, parameters, sides[0], f"pair {pair}, chosen", trim=trim)
    rejected, rejected_norm = row_gradient(model, parameters, sides[1], f"pair {pair}, rejected", trim=trim)
    for name, part in rejected.items():
        vector[name] = vector[name] - part if name in vector else -part
    square = sum(dot(vector, vector).values())
    norm = math.sqrt(square)
    return Direction(vector, norm, ExpectedSum(1.0, -1.0, square, (chosen_norm + rejected_norm) * norm))


def _shared_direction(
    toward: str | Mapping[str, Tensor] | Tensor, optimizer: object, parameters: Mapping[str, Tensor]
) -> Direction:
    """The direction that all pairs share: the optimizer's next step, or the user's vector."""
    vector = planned_step(optimizer, parameters) if isinstance(toward, str) else given_vector(toward, parameters)
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
    return Direction(moving, math.sqrt(sum(squares.values())))


def _with_expected_sum(
    direction: Direction, model: nn.Module, parameters: Mapping[str, Tensor], sides: Sequence[Row], *, trim: bool
) -> Direction:
    """The direction, with the sum of effects that a backward pass of the rejected row gives."""
    gradient, norm = row_gradient(model, parameters, sides[1], "pair 0, rejected", trim=trim)
    value = sum(dot(gradient, direction.vector).values())
    return replace(direction, expected=ExpectedSum(0.0, 1.0, value, norm * direction.norm))
