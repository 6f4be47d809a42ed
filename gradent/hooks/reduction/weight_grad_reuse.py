"""`weight_grad="shared"`: a trainer's backward whose weight gradients come out of the products that are measured.

While active, a product of activations with a trainable matrix becomes one `autograd.Function`: its forward is the same
call, its backward forms the weight's gradient as torch would, unless the measuring of that use, which comes just
before, has given it one. Only the order of summation differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from gradent.hooks.capture.checkpointing import current_region, packs_tensors

__all__ = ["Sharing", "give", "is_shared"]

_OURS = "_gradent_sharing"


class _Product(torch.autograd.Function):
    """`x wᵀ + bias`, or `bias + x w` of two matrices."""

    @staticmethod
    def forward(ctx: Any, func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = func is F.linear
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.given = None
        operand = weight.to(x.dtype)
        if ctx.transposed:
            return F.linear(x, operand, None if bias is None else bias.to(x.dtype))
        assert bias is not None
        return torch.addmm(bias.to(x.dtype), x, operand)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        made, ctx.given = _made_of(ctx.given, grad), None
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            operand = weight.to(grad.dtype)
            grad_x = (flat @ (operand if ctx.transposed else operand.T)).view(x.shape)
        if ctx.needs_input_grad[2]:
            if made is None:
                inputs = x.reshape(-1, x.shape[-1])
                made = flat.T @ inputs if ctx.transposed else inputs.T @ flat
            grad_weight = made.to(weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return None, grad_x, grad_weight, grad_bias


def _made_of(given: tuple[Tensor, int, Tensor] | None, grad: Tensor) -> Tensor | None:
    """The gradient that was given, if it was made of this very cotangent (a hook may have changed it since)."""
    if given is None:
        return None
    source, version, made = given
    same = source.data_ptr() == grad.data_ptr() and source.shape == grad.shape and source._version == version  # noqa: SLF001
    return made if same else None


def is_shared(node: Node) -> bool:
    """Whether a use's node takes a weight gradient from `give`."""
    return isinstance(node, _Product._backward_cls)  # noqa: SLF001  (the type of a node that it makes)


def give(node: Any, cotangent: Tensor, grad: Tensor) -> None:
    """Hand a product its weight's gradient, which its backward then returns instead of forming one.

    Args:
        node: the node of the product's output, for which `is_shared` is true, before its backward runs.
        cotangent: what the gradient was made of; should the backward be given another, it forms its own.
        grad: of the weight's shape.
    """
    node.given = (cotangent, cotangent._version, grad)  # noqa: SLF001  (torch has no public name for it)


class Sharing(TorchFunctionMode):
    """Replaces products with trainable matrices by `_Product`, in a forward pass and where it is computed again.

    Args:
        parameters: the trainable parameters.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._matrices = {id(one) for one in parameters if one.dim() == 2 and type(one) is nn.Parameter}
        self._depth = 0

    def start(self) -> None:
        """Replace from here on."""
        self._depth += 1
        if self._depth == 1:
            self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Replace no more."""
        self._depth -= 1
        if self._depth == 0:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = _operands(func, args, kwargs) if torch.is_grad_enabled() else None
        if operands is None or id(operands[1]) not in self._matrices or not self._recurs():
            return func(*args, **kwargs)
        x, weight, bias = operands
        device = x.device.type
        cast = torch.is_autocast_enabled(device)
        if cast:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            return _Product.apply(func, x, weight, bias)  # type: ignore[no-untyped-call]

    def _recurs(self) -> bool:
        """Whether a call that is replaced here will be replaced again where a checkpointed region is computed again."""
        if not packs_tensors():
            return True
        region = current_region()
        if region is None:
            return False
        if getattr(region, _OURS, None) is self:
            return True
        inner = getattr(region, "recompute_fn", None)
        if inner is None or getattr(region, _OURS, None) is not None:
            return False

        def recompute(*args: Any, **kwargs: Any) -> Any:
            self.start()
            try:
                return inner(*args, **kwargs)
            finally:
                self.stop()

        region.recompute_fn = recompute
        setattr(region, _OURS, self)
        return True


_NAMES: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    F.linear: (("input", "weight", "bias"), ("input", "weight", "bias")),
    torch.addmm: (("input", "mat1", "mat2"), ("mat1", "mat2", "input")),
}
"""Calls that can be replaced: their arguments, and which of them are the activations, the weight and the bias."""


def _operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Activations, weight and bias of a call that can be replaced; None of any other."""
    if func not in _NAMES:
        return None
    order, roles = _NAMES[func]
    given = dict(zip(order, args, strict=False)) | kwargs
    x, weight, bias = (given.pop(name, None) for name in roles)
    if given or type(x) is not Tensor or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        return None  # beta=, alpha=, out=
    if bias is not None and (type(bias) not in (Tensor, nn.Parameter) or bias.dim() != 1):
        return None
    if func is torch.addmm and (bias is None or x.dim() != 2):
        return None
    alike = all(one.dtype == x.dtype for one in (weight, bias) if one is not None)
    return (x, weight, bias) if alike or torch.is_autocast_enabled(x.device.type) else None
