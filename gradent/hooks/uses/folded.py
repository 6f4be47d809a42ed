"""Weights folded together from two trainable factors, `W + s L R`: PEFT's LoRA on parameters (experts, routers).

Such a tensor is followed like a parameter, under a number of its own below zero. A use of it is then one of each
factor: with `G_e` the gradient of expert e's matrix, `s G_e R_eᵀ` is L's and `s L_eᵀ G_e` is R's.

Letters: E experts, p and q the rows and columns of a matrix, r the rank, R rows of the forward, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradent.hooks.uses.formats import Factored, Form, LazyFactored, Materialized, Solid, SparseRows
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.parameter_views import View
from gradent.hooks.uses.uses import Use
from gradent.kernels.common.numerics import accumulator

__all__ = ["Folded", "FoldedUse", "fold"]


@dataclass(frozen=True)
class Folded:
    """`s L R`, of two whole parameters: L `[E, p, r]` and R `[E, r, q]`, or both without E."""

    params: tuple[int, int]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]  # of the parameters
    factors: tuple[Tensor, Tensor]  # L and R, detached; their strides say which entry of the parameter is where
    scale: float

    @property
    def key(self) -> tuple[int, int, float]:
        """The same when the product is formed again."""
        return *self.params, self.scale

    def gradient(self, form: Solid, side: int, slot: tuple[int, ...]) -> Tensor:
        """A factor's gradient from that of a matrix of the product, wide."""
        left, right = (factor[slot] for factor in self.factors)
        if isinstance(form, SparseRows):
            values = form.values
            wide = accumulator(values.dtype)
            if side:
                return self.scale * (left[form.ids].to(wide).T @ values.to(wide))
            grad = torch.zeros(left.shape, dtype=wide, device=left.device)
            return grad.index_add_(0, form.ids, self.scale * (values.to(wide) @ right.to(wide).T))
        if isinstance(form, Factored):
            u, v = form.u.to(accumulator(form.u.dtype)), form.v.to(accumulator(form.v.dtype))
            if side:
                return self.scale * ((u @ left.to(u.dtype)).T @ v)
            return self.scale * (u.T @ (v @ right.to(v.dtype).T))
        grad = form.grad.to(accumulator(form.grad.dtype))
        return self.scale * (left.to(grad.dtype).T @ grad if side else grad @ right.to(grad.dtype).T)


@dataclass(frozen=True)
class FoldedUse:
    """A use of a folded weight, as one of its left factor (side 0) or its right one (side 1)."""

    inner: Use
    folded: Folded
    side: int
    depth: int = 0

    @property
    def view(self) -> View:
        """See `Use`."""
        return View(self.folded.params[self.side], (), self.folded.shapes[self.side])

    @property
    def without_activations(self) -> FoldedUse:
        """See `Use`."""
        return replace(self, inner=self.inner.without_activations)

    def gradients(self, grad_output: Tensor, layout: Layout, budget: int) -> Tensor:
        """Every row's gradient of the factor's parameter, `[R, *shape]`, wide."""
        factor, shape = self.folded.factors[self.side], self.folded.shapes[self.side]
        wide = accumulator(factor.dtype)
        grads = torch.zeros(layout.rows, *shape, dtype=wide, device=grad_output.device)
        for row, slot, form in self.inner.forms(grad_output, layout, budget):
            solid = form.make() if isinstance(form, LazyFactored) else form
            part = grads[row]
            placed = part.as_strided(factor.shape, factor.stride(), part.storage_offset())
            placed[slot] += self.folded.gradient(solid, self.side, slot)
        return grads

    def forms(self, grad_output: Tensor, layout: Layout, budget: int) -> Iterator[tuple[int, tuple[int, ...], Form]]:
        """See `Use`."""
        for row, grad in enumerate(self.gradients(grad_output, layout, budget)):
            yield row, (), Materialized(grad)


Find = Callable[[Any], "View | None"]


def fold(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], find: Find, known: Mapping[int, Folded]) -> Any:
    """What a call made of two factors, or of a product of them: a `Folded`; None for anything else."""
    if func in (torch.baddbmm, torch.Tensor.baddbmm) and len(args) == 3 and set(kwargs) <= {"alpha"}:
        is_plain = find(args[0]) is None and args[1].dim() == 3
        return _product(args[1], args[2], float(kwargs.get("alpha", 1)), find) if is_plain else None
    if func in (torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm) and len(args) == 2 and not kwargs:
        return _product(args[0], args[1], 1.0, find) if args[0].dim() == args[1].dim() == 2 else None
    view, other = (find(args[0]), args[1]) if len(args) == 2 and not kwargs else (None, None)
    if func in (torch.add, torch.Tensor.add) and view is None and len(args) == 2:
        view, other = find(other), args[0]
    before = None if view is None else known.get(view.param)
    if before is None or view is None or view.slot or not view.plain or view.flipped:
        return None
    if func in (torch.mul, torch.Tensor.mul) and isinstance(other, (int, float)):
        return replace(before, scale=before.scale * other)
    if func not in (torch.add, torch.Tensor.add) or not isinstance(other, Tensor) or find(other) is not None:
        return None
    return before if tuple(other.shape) == view.shape else None


def _product(left: Tensor, right: Tensor, scale: float, find: Find) -> Folded | None:
    """`s L R` of two parameters, each of them whole."""
    views = find(left), find(right)
    one, other = views
    if one is None or other is None or one.param < 0 or other.param < 0 or one.param == other.param:
        return None
    if any(view.slot or view.gain is not None or view.ids is not None for view in (one, other)):
        return None
    shapes = (one.shape, other.shape)
    factors = left.detach(), right.detach()
    is_dense = all(
        factor.numel() == torch.Size(shape).numel() and _is_dense(factor)
        for factor, shape in zip(factors, shapes, strict=True)
    )
    return Folded((one.param, other.param), shapes, factors, scale) if is_dense else None


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills one piece of memory, in any order of its axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
