"""Matrix products: linear layers, HF's Conv1D, raw `x @ W`, fused experts. `G = Σ_t b_t a_tᵀ`, kept factored."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from gradent.hooks.rules.elementwise import sum_use
from gradent.hooks.rules.registry import Call, register_rule
from gradent.hooks.uses.parameter_views import View
from gradent.hooks.uses.uses import GroupedUse, MatrixUse, Use

__all__ = ["LINEAR"]


def _is_matrix(view: View | None) -> TypeGuard[View]:
    return view is not None and view.plain and len(view.shape) == 2


LINEAR = torch._C._nn.linear  # noqa: SLF001  (`F.linear`, also where somebody has put a function of his own there)


@register_rule(LINEAR)
def linear(call: Call) -> list[Use]:
    """`F.linear(input, weight, bias)`, weight `[O, I]`."""
    named = call.bind("input", "weight", "bias", bias=None)
    return [] if named is None else _affine(call, named["input"], named["weight"], named["bias"], swapped=False)


def _affine(call: Call, x: Tensor, matrix: Any, bias: Any, *, swapped: bool) -> list[Use]:
    """Uses of the matrix V and of the bias of `x Vᵀ + bias`, or of `x V + bias` when `swapped`."""
    uses: list[Use] = []
    view = call.find(matrix)
    if _is_matrix(view) and call.find(x) is None and call.splits(x):
        uses.append(MatrixUse(view, x.detach(), swapped=view.flipped != swapped))
    return uses + sum_use(call, bias, None, x)


@register_rule(torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm)
def matmul(call: Call) -> list[Use]:
    """`x @ V` with V `[I, O]`, and `V @ x` with V `[O, I]`, the other operand free of parameters."""
    left, right = call.args if len(call.args) == 2 else (None, None)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return []
    for view, other, on_right in ((call.find(right), left, True), (call.find(left), right, False)):
        if not _is_matrix(view) or call.find(other) is not None:
            continue
        if not on_right and other.dim() < (3 if call.layout.rows > 1 else 2):
            continue  # [I, tokens]: rows would have to be told apart along the last axis
        use = MatrixUse(view, other.detach(), swapped=view.flipped != on_right, transposed=not on_right)
        if on_right:
            return [use] if call.splits(other) else []
        return [use] if all(call.layout.splits(tensor.mT, 1) for tensor in (other, call.out)) else []
    return []


@register_rule(torch.addmm, torch.Tensor.addmm)
def addmm(call: Call) -> list[Use]:
    """`addmm(bias, x, V)` with V `[I, O]`: HF's Conv1D."""
    named = call.bind("input", "mat1", "mat2")
    return [] if named is None else _affine(call, named["mat1"], named["mat2"], named["input"], swapped=True)


def grouped(call: Call) -> list[Use]:
    """`grouped_mm(x, V, offs=ends)` with V `[E, I, O]`, x sorted by expert: one row a forward only."""
    named = call.bind("mat_a", "mat_b", "offs", "bias", "out_dtype", offs=None, bias=None, out_dtype=None)
    if named is None or call.layout.rows != 1 or named["offs"] is None or call.out.dim() != 2:
        return []
    view = call.find(named["mat_b"])
    if view is None or view.slot or not view.plain or len(view.shape) != 3 or call.find(named["mat_a"]) is not None:
        return []
    # In the call's orientation G_V is [I, O]; a flipped view means that the parameter is [E, O, I].
    return [GroupedUse(view, named["mat_a"].detach(), named["offs"])] if named["bias"] is None else []


# torch.nn.functional.grouped_mm calls this one, under whose name alone it can be seen.
GROUPED_MM = getattr(torch, "_grouped_mm", None)
if GROUPED_MM is not None:
    register_rule(GROUPED_MM)(grouped)
