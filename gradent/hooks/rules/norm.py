"""Fused norms with affine parameters: the factor of the weight is the normalized input, computed again."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gradent.hooks.rules.elementwise import sum_use
from gradent.hooks.rules.registry import Call, register_rule
from gradent.hooks.uses.uses import Use
from gradent.kernels.common.numerics import accumulator

__all__: list[str] = []


@register_rule(F.layer_norm)
def layer_norm(call: Call) -> list[Use]:
    """`F.layer_norm(input, normalized_shape, weight, bias, eps)`."""
    named = call.bind("input", "normalized_shape", "weight", "bias", "eps", weight=None, bias=None, eps=1e-5)
    if named is None or call.find(named["input"]) is not None:
        return []
    operand, shape, eps = named["input"], named["normalized_shape"], named["eps"]
    uses = sum_use(call, named["bias"], None, operand)
    if call.find(named["weight"]) is not None:
        x = operand.detach()
        wide = accumulator(x.dtype)
        uses += sum_use(call, named["weight"], lambda cut: F.layer_norm(cut(x).to(wide), shape, eps=eps), operand)
    return uses


@register_rule(F.rms_norm, torch.rms_norm)
def rms_norm(call: Call) -> list[Use]:
    """`F.rms_norm(input, normalized_shape, weight, eps)`."""
    named = call.bind("input", "normalized_shape", "weight", "eps", weight=None, eps=None)
    if named is None or call.find(named["input"]) is not None or call.find(named["weight"]) is None:
        return []
    x, shape = named["input"].detach(), named["normalized_shape"]
    # eps=None means the machine epsilon of the input's own dtype, not of the accumulator's.
    eps = torch.finfo(x.dtype).eps if named["eps"] is None else named["eps"]
    wide = accumulator(x.dtype)
    return sum_use(call, named["weight"], lambda cut: F.rms_norm(cut(x).to(wide), shape, eps=eps), named["input"])
