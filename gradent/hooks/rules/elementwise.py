"""Elementwise products and sums: norm weights, biases, IA3's scales. `G = Σ b · factor` over the broadcast axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradent.hooks.rules.registry import Call, register_rule
from gradent.hooks.uses.picked import picked_sum
from gradent.hooks.uses.uses import Factor, SumUse, Use

__all__ = ["sum_use"]


def sum_use(call: Call, operand: Any, factor: Factor | None, beside: Tensor | None = None) -> list[Use]:
    """The use of an operand that was broadcast and multiplied by `factor`; none if rows cannot be told apart."""
    view = call.find(operand)
    if view is None or view.flipped:
        return []
    layout, out = call.layout, call.out
    like = out if beside is None else beside
    if layout.rows > 1 and call.moved(like):
        rows = call.rows(like) if like.dim() == out.dim() == 2 else None
        return [] if rows is None else picked_sum(view, operand, factor, rows)
    if not layout.broadcasts(out, operand):
        return []
    if layout.rows > 1 and layout.is_flat(out) and not call.ordered(like):
        return []
    return [SumUse(view, operand.shape, factor)]


@register_rule(torch.mul, torch.Tensor.mul)
def multiply(call: Call) -> list[Use]:
    """`weight * x`, either way round."""
    left, right = call.args if len(call.args) == 2 else (None, None)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return []
    if (call.find(left) is None) == (call.find(right) is None):
        return []
    operand, other = (right, left) if call.find(left) is None else (left, right)
    factor = other.detach().expand(call.out.shape)
    return sum_use(call, operand, lambda cut: cut(factor), other)


@register_rule(torch.add, torch.Tensor.add, torch.Tensor.add_)
def add(call: Call) -> list[Use]:
    """`x + bias`, either way round, and `x += bias`."""
    left, right = call.args if len(call.args) == 2 and not call.kwargs else (None, None)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return []
    return [use for operand, other in ((left, right), (right, left)) for use in sum_use(call, operand, None, other)]


@register_rule(torch.Tensor.expand)
def expand(call: Call) -> list[Use]:
    """`weight.expand(R, ...)`: a parameter that is put beside activations of every row, as attention sinks are."""
    operand = call.args[0]
    if call.out.dim() != operand.dim() or operand.shape[0] != 1:
        return []
    return sum_use(call, operand, None)
