"""Forward-mode automatic differentiation of a model: `push`, and the rules that make it cheap and right.

torch carries a tangent next to every value. Left to itself it multiplies by the zero tangent of every frozen weight,
takes tangents through `torch.no_grad()` and through an embedding's padding row, where a backward pass has none, and
knows no tangent of a grouped product. A torch function mode stands in at those places.

Letters: x a value, dx its tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from gradent.kernels.common.numerics import accumulator

__all__ = ["push", "split"]

Rule = Callable[..., Any]
Result = TypeVar("Result")


def push(
    function: Callable[[Mapping[str, Tensor]], Result], values: Mapping[str, Tensor], vector: Mapping[str, Tensor]
) -> Result:
    """Call `function(θ)` in forward mode along v, given for some of θ's names; `split` shows the tangents."""
    with _no_fused_attention(), forward_ad.dual_level():
        duals = {name: _joined(value.detach(), [vector.get(name)]) for name, value in values.items()}
        with _Rules():
            return function(duals)


def split(value: Any) -> tuple[Any, Tensor | None]:
    """`(x, dx)` of a tensor inside `push`; None where it has no tangent, as numbers do."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):  # a parameter left in its place is frozen
        return value, None
    primal, tangent = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
    return primal, tangent


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """Switch off attention kernels that have no forward derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Rules(TorchFunctionMode):
    """Calls a function's rule, or torch if there is none or it declines."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.requires_grad_:  # for checkpointing's sake: a graph that nobody would use
            return args[0]
        rule, result = _RULES.get(func), NotImplemented
        if rule is not None and len(args) > 1 and _are_plain(args) and _are_plain(kwargs.values()):
            result = rule(func, *args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        # torch.no_grad() says nothing to forward mode; the model meant a constant by it.
        return result if torch.is_grad_enabled() else tree_map(lambda value: split(value)[0], result)


def _are_plain(values: Any) -> bool:
    """Whether no argument is of a tensor subclass (quantized, sharded), which the rules do not know."""
    return all(type(value) in (Tensor, nn.Parameter) for value in values if isinstance(value, Tensor))


def _joined(value: Tensor, parts: Sequence[Tensor | None]) -> Tensor:
    """x with the sum of the given tangents as its own; the first is changed in place."""
    tangents = [part for part in parts if part is not None]
    if not tangents:
        return value
    total = tangents[0]
    for part in tangents[1:]:
        total += part
    dual: Tensor = forward_ad.make_dual(value, total)  # type: ignore[no-untyped-call]
    return dual


def _product(func: Rule, left: Any, right: Any, **kwargs: Any) -> Any:
    """`x ∘ y`: `dx ∘ y + x ∘ dy`, without the half whose tangent is zero."""
    if kwargs.get("out") is not None or kwargs.get("bias") is not None:
        return NotImplemented
    (x, dx), (y, dy) = split(left), split(right)
    halves = [None if dx is None else func(dx, y, **kwargs), None if dy is None else func(x, dy, **kwargs)]
    return _joined(func(x, y, **kwargs), halves)


def _quotient(func: Rule, left: Any, right: Any, **kwargs: Any) -> Any:
    """`x / c`: `dx / c`."""
    (x, dx), (c, dc) = split(left), split(right)
    if kwargs or dc is not None:
        return NotImplemented
    return _joined(func(x, c), [None if dx is None else func(dx, c)])


def _shift(func: Rule, left: Any, right: Any, **kwargs: Any) -> Any:
    """`x + c`, `c + x` and `x - c`: dx."""
    (x, dx), (y, dy) = split(left), split(right)
    if kwargs or (dx is None) == (dy is None) or (dx is None and func in _DIFFERENCES):
        return NotImplemented
    value = func(x, y)
    return _joined(value, [_spread(dy if dx is None else dx, value)])


def _linear(func: Rule, left: Any, weight: Any, bias: Any = None) -> Any:
    """`x wᵀ + b`."""
    (x, dx), (w, dw), (b, db) = split(left), split(weight), split(bias)
    value = func(x, w, b)
    parts = [None if dx is None else func(dx, w), None if dw is None else func(x, dw), _spread(db, value)]
    return _joined(value, parts)


def _addmm(func: Rule, bias: Any, left: Any, right: Any, **kwargs: Any) -> Any:
    """`b + x w`: GPT-2's layers."""
    if kwargs:
        return NotImplemented
    (b, db), (x, dx), (w, dw) = split(bias), split(left), split(right)
    value = func(b, x, w)
    parts = [None if dx is None else torch.mm(dx, w), None if dw is None else torch.mm(x, dw), _spread(db, value)]
    return _joined(value, parts)


def _spread(tangent: Tensor | None, value: Tensor) -> Tensor | None:
    """The tangent in x's shape and dtype, copied: the model may write into x, which moves its tangent too."""
    return None if tangent is None else torch.empty_like(value).copy_(tangent)


def _embedding(
    func: Rule,
    ids: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Looked-up rows move as in a backward pass: padding not at all, and divided by frequency if asked."""
    w, dw = split(weight)
    if dw is None or max_norm is not None:
        return NotImplemented
    moved = func(ids, dw)
    if padding_idx is not None:
        moved.masked_fill_((ids == padding_idx % len(w))[..., None], 0)
    if scale_grad_by_freq:
        moved /= torch.bincount(ids.flatten(), minlength=len(w))[ids][..., None]
    return _joined(func(ids, w, padding_idx), [moved])


def _attention(
    func: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`softmax(q kᵀ / √d) v` under a causal mask or none, spelt out, so that rules apply inside."""
    if attn_mask is not None or dropout_p:
        return NotImplemented
    wide = accumulator(query.dtype)
    with _Rules():
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
        scores = (query.to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.to(wide).mT
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
            scores = scores.masked_fill(later, float("-inf"))
        return (scores.softmax(-1) @ value.to(wide)).to(query.dtype)


_DIFFERENCES = (torch.sub, Tensor.sub)

_RULES: dict[Any, Rule] = {
    **dict.fromkeys((torch.mul, torch.matmul, torch.mm, torch.bmm), _product),
    **dict.fromkeys((Tensor.mul, Tensor.matmul, Tensor.mm, Tensor.bmm), _product),
    **dict.fromkeys((torch.div, Tensor.div), _quotient),
    **dict.fromkeys((torch.add, Tensor.add, *_DIFFERENCES), _shift),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    F.linear: _linear,
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _attention,
}
if hasattr(torch, "_grouped_mm"):  # what torch.nn.functional.grouped_mm calls
    _RULES[torch._grouped_mm] = _product  # noqa: SLF001  (no public name shows itself to a mode)
