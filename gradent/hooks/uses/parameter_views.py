"""Which tensors of a forward pass are a trainable parameter, or a plain view of one.

Model code rarely hands `self.weight` itself to an operator: it transposes it, casts it, picks an expert, adds one.
These steps leave the gradient's entries what they are (only placed differently), so they are followed; anything else
ends the trail, and the coverage check (`graph.py`) finds the parameter by another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["View", "follow"]


@dataclass(frozen=True)
class View:
    """A tensor that holds a slot of a parameter.

    Attributes:
        param: the parameter's number.
        slot: leading indices already taken (the expert's number of a fused 3-D parameter).
        shape: the slot's shape in the parameter's orientation.
        flipped: the last two axes are swapped.
        reshaped: axes were added, dropped or merged; only elementwise rules may use it.
        gain: a constant of the slot's shape that multiplies its entries (DoRA's magnitudes over a weight's norm); only
            elementwise rules may use it; None for 1.
        ids: int64, the rows looked up, where the tensor is a lookup shared by all rows of the batch (learned positions,
            broadcast afterwards); None otherwise.
    """

    param: int
    slot: tuple[int, ...]
    shape: tuple[int, ...]
    flipped: bool = False
    reshaped: bool = False
    gain: Tensor | None = field(default=None, compare=False)
    ids: Tensor | None = field(default=None, compare=False)

    @property
    def plain(self) -> bool:
        """Whether the tensor is the slot itself, or its transpose, and nothing besides."""
        return not self.reshaped and self.gain is None


def _same(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    """Casts and copies on the same device."""
    return view if out.shape == source.shape and out.device == source.device else None


def _flip(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    if view.reshaped or source.dim() not in (2, 3) or out.shape[-2:] != source.shape[-2:][::-1]:
        return None
    return replace(view, flipped=not view.flipped)


def _flip_2d(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    return _flip(view, source, args, kwargs, out) if source.dim() == 2 else None


def _transpose(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    axes = [*args[1:], *kwargs.values()]
    last_two = {source.dim() - 1, source.dim() - 2}
    if len(axes) != 2 or not all(isinstance(axis, int) for axis in axes):
        return None
    return _flip(view, source, args, kwargs, out) if {axis % source.dim() for axis in axes} == last_two else None


def _reshape(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    if view.flipped or out.numel() != source.numel():
        return None
    return replace(view, reshaped=view.reshaped or out.shape != source.shape)


def _index(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    index = args[1]
    if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool:
        index = int(index)
    if isinstance(index, int) and not isinstance(index, bool):
        return _take(view, source, index)
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Tensor) for part in parts):
        return None
    whole = all(part is None or part is Ellipsis or part == slice(None) for part in parts)
    return _reshape(view, source, args, kwargs, out) if whole else None


def _select(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    named = dict(zip(("dim", "index"), args[1:], strict=False)) | kwargs
    if named.get("dim") != 0 or not isinstance(named.get("index"), int):
        return None
    return _take(view, source, named["index"])


def _take(view: View, source: Tensor, index: int) -> View | None:
    """The matrix `index` of a fused 3-D parameter, or a row of its 2-D bias."""
    if view.reshaped or view.slot or source.dim() not in (2, 3) or (view.flipped and source.dim() == 2):
        return None
    return replace(view, slot=(index % source.shape[0],), shape=view.shape[1:])


def _plus_scalar(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    """`1 + weight`, as in Gemma's norms."""
    if kwargs or len(args) != 2 or not any(isinstance(arg, (int, float)) for arg in args):
        return None
    return view


def _times_one(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    """`1 * weight`: where a product over adapters begins, as in IA3."""
    if kwargs or len(args) != 2 or not any(isinstance(arg, (int, float)) and arg == 1 for arg in args):
        return None
    return view


def _over(view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> View | None:
    """`weight / constant`, entry by entry."""
    constant = args[1] if len(args) == 2 and not kwargs else None
    if not isinstance(constant, Tensor) or constant.requires_grad or constant.shape != source.shape or view.flipped:
        return None
    if view.ids is not None or out.shape != source.shape:
        return None
    gain = 1 / constant.detach().reshape(view.shape)
    return replace(view, gain=gain if view.gain is None else view.gain * gain)


def _minus_scalar(
    view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> View | None:
    """`weight - 1`."""
    return view if not kwargs and len(args) == 2 and isinstance(args[1], (int, float)) else None


def _shared_lookup(
    view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> View | None:
    """`F.embedding(ids, weight)` with ids that carry no batch axis, which the embedding's rule therefore left alone."""
    named = (
        dict(zip(("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args, strict=False))
        | kwargs
    )
    special = (
        any(named.get(name) for name in ("max_norm", "scale_grad_by_freq")) or named.get("padding_idx") is not None
    )
    if view.flipped or not view.plain or view.slot or view.ids is not None or special:
        return None
    return replace(view, ids=named["input"], reshaped=True)


Step = Callable[[View, Tensor, tuple[Any, ...], dict[str, Any], Tensor], "View | None"]

STEPS: dict[Any, Step] = {
    **dict.fromkeys(
        (
            torch.Tensor.to,
            torch.Tensor.float,
            torch.Tensor.double,
            torch.Tensor.half,
            torch.Tensor.bfloat16,
            torch.Tensor.type,
            torch.Tensor.type_as,
            torch.Tensor.contiguous,
            torch.Tensor.clone,
        ),
        _same,
    ),
    torch.Tensor.t: _flip_2d,
    torch.t: _flip_2d,
    torch.Tensor.T.__get__: _flip_2d,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: _flip,  # type: ignore[attr-defined]
    torch.Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    **dict.fromkeys(
        (
            torch.Tensor.view,
            torch.Tensor.reshape,
            torch.reshape,
            torch.Tensor.unsqueeze,
            torch.unsqueeze,
            torch.Tensor.squeeze,
            torch.squeeze,
            torch.Tensor.flatten,
            torch.flatten,
        ),
        _reshape,
    ),
    torch.Tensor.__getitem__: _index,
    torch.Tensor.select: _select,
    torch.select: _select,
    **dict.fromkeys((torch.Tensor.add, torch.add), _plus_scalar),
    **dict.fromkeys((torch.Tensor.mul, torch.mul), _times_one),
    **dict.fromkeys((torch.Tensor.sub, torch.sub), _minus_scalar),
    **dict.fromkeys((torch.Tensor.div, torch.div, torch.Tensor.true_divide), _over),
    F.embedding: _shared_lookup,
}
"""What is followed: torch function -> how the view changes."""


def follow(
    func: Any, view: View, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> View | None:
    """The view that `out = func(*args, **kwargs)` is, given that its argument `source` is `view`.

    Args:
        func: the torch function that was called.
        view: what `source` is.
        source: the tracked argument.
        args: the call's positional arguments.
        kwargs: the call's keyword arguments.
        out: the call's result.

    Returns:
        The result's view, or None where the trail ends.
    """
    step = STEPS.get(func)
    if step is None or not isinstance(out, Tensor):
        return None
    if step not in (_plus_scalar, _times_one, _shared_lookup) and (not args or args[0] is not source):
        return None
    return step(view, source, args, kwargs, out)
