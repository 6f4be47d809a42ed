"""Matrix products: linear layers, HF's Conv1D, raw `x @ W`, fused experts. `G = Σ_t b_t a_tᵀ`, kept factored."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from gradent.hooks.rules.elementwise import sum_use
from gradent.hooks.rules.registry import Call, register_rule
from gradent.hooks.uses.parameter_views import View
from gradent.hooks.uses.picked import PickedUse
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
    if _is_matrix(view) and call.find(x) is None:
        uses += _product(call, view, x, swapped=view.flipped != swapped)
    return uses + sum_use(call, bias, None, x)


def _product(call: Call, view: View, x: Tensor, *, swapped: bool) -> list[Use]:
    """The use of a matrix by tokens `[..., I]` in the batch's order, or picked from it."""
    if call.splits(x):
        return [MatrixUse(view, x.detach(), swapped=swapped)]
    rows = call.rows(x) if call.layout.rows > 1 and x.dim() == call.out.dim() == 2 else None
    return [] if rows is None else [PickedUse(view, x.detach(), rows, swapped=swapped)]


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
        if on_right:
            return _product(call, view, other, swapped=not view.flipped)
        use = MatrixUse(view, other.detach(), swapped=view.flipped, transposed=True)
        return [use] if all(call.layout.splits(tensor.mT, 1) for tensor in (other, call.out)) else []
    return []


@register_rule(torch.addmm, torch.Tensor.addmm)
def addmm(call: Call) -> list[Use]:
    """`addmm(bias, x, V)` with V `[I, O]`: HF's Conv1D."""
    named = call.bind("input", "mat1", "mat2")
    return [] if named is None else _affine(call, named["mat1"], named["mat2"], named["input"], swapped=True)


def grouped(call: Call) -> list[Use]:
    """`grouped_mm(x, V, offs=ends)` with V `[E, I, O]`, x sorted by expert."""
    named = call.bind("mat_a", "mat_b", "offs", "bias", "out_dtype", offs=None, bias=None, out_dtype=None)
    if named is None or named["offs"] is None or named["bias"] is not None or call.out.dim() != 2:
        return []
    view, x, ends = call.find(named["mat_b"]), named["mat_a"], named["offs"]
    if view is None or view.slot or not view.plain or len(view.shape) != 3 or call.find(x) is not None:
        return []
    # In the call's orientation G_V is [I, O]; a flipped view means that the parameter is [E, O, I].
    if call.layout.rows == 1:
        return [GroupedUse(view, x.detach(), ends)]
    rows = call.rows(x)
    return [] if rows is None else [PickedUse(view, x.detach(), rows, swapped=not view.flipped, ends=ends)]


@register_rule(torch.bmm, torch.Tensor.bmm)
def batched(call: Call) -> list[Use]:
    """`bmm(x, V)` with V `[E, I, O]` and x `[E, tokens, I]`, or V `[n, I, O]` or `[n, O, I]` looked up for n tokens."""
    left, right = call.args if len(call.args) == 2 and not call.kwargs else (None, None)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return []
    view, x, on_right = call.find(right), left, True
    if view is None:
        view, x, on_right = call.find(left), right.mT, False
    if view is None or view.slot or len(view.shape) != 3 or call.find(left if on_right else right) is not None:
        return []
    looks_up = view.ids is not None and x.shape[1] == 1
    rows = call.rows(x) if looks_up or (view.plain and on_right) else None
    if rows is None:
        return []
    experts = view.ids if looks_up else torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
    return [PickedUse(view, x.detach(), rows, swapped=on_right != view.flipped, experts=experts)]


# torch.nn.functional.grouped_mm calls this one, under whose name alone it can be seen.
GROUPED_MM = getattr(torch, "_grouped_mm", None)
if GROUPED_MM is not None:
    register_rule(GROUPED_MM)(grouped)
