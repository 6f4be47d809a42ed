"""Which tensors of a forward pass are a trainable parameter, or a plain view of one.

Model code rarely hands `self.weight` itself to an operator: it transposes it, casts it, picks an expert, adds one.
These steps leave the gradient's entries what they are (only placed differently), so they are followed; anything else
ends the trail, and the coverage check (`capture/coverage.py`) finds the parameter in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["View", "follow"]


@dataclass(frozen=True)
class View:
    """A tensor that holds a slot of a parameter."""

    param: int  # the parameter's number
    slot: tuple[int, ...]  # leading indices already taken: the expert's number of a fused 3-D parameter
    shape: tuple[int, ...]  # the slot's, in the parameter's orientation
    flipped: bool = False  # the last two axes are swapped
    reshaped: bool = False  # axes were added, dropped or merged; for elementwise rules only
    # A constant of the slot's shape that multiplies its entries (DoRA's magnitudes over a weight's norm), None for 1;
    # for elementwise rules only.
    gain: Tensor | None = field(default=None, compare=False)
    # int64, the rows looked up, of a lookup shared by all rows of the batch (learned positions, broadcast afterwards).
    ids: Tensor | None = field(default=None, compare=False)

    @property
    def plain(self) -> bool:
        """Whether the tensor is the slot itself, or its transpose, and nothing besides."""
        return not self.reshaped and self.gain is None


class Operation(NamedTuple):
    """One call `out = func(*args, **kwargs)` on `source`, which is `view`."""

    view: View
    source: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor


def _same(op: Operation) -> View | None:
    """Casts and copies on the same device."""
    return op.view if op.out.shape == op.source.shape and op.out.device == op.source.device else None


def _flip(op: Operation) -> View | None:
    if op.view.reshaped:
        return _permute(op)
    if op.source.dim() not in (2, 3) or op.out.shape[-2:] != op.source.shape[-2:][::-1]:
        return None
    return replace(op.view, flipped=not op.view.flipped)


def _permute(op: Operation) -> View | None:
    """All entries in another order of axes: for factors alone that are folded into another weight."""
    return replace(op.view, flipped=True, reshaped=True) if op.view.gain is None and op.view.ids is None else None


def _flip_2d(op: Operation) -> View | None:
    return _flip(op) if op.source.dim() == 2 else None


def _transpose(op: Operation) -> View | None:
    axes, dims = [*op.args[1:], *op.kwargs.values()], op.source.dim()
    if len(axes) != 2 or not all(isinstance(axis, int) for axis in axes):
        return None
    return _flip(op) if {axis % dims for axis in axes} == {dims - 1, dims - 2} else None


def _reshape(op: Operation) -> View | None:
    if op.view.flipped or op.out.numel() != op.source.numel():
        return None
    return replace(op.view, reshaped=op.view.reshaped or op.out.shape != op.source.shape)


def _index(op: Operation) -> View | None:
    index = op.args[1]
    if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool:
        index = int(index)
    if isinstance(index, int) and not isinstance(index, bool):
        return _take(op, index)
    if isinstance(index, Tensor) and index.dim() == 1 and not index.is_floating_point() and index.dtype != torch.bool:
        return _look_up(op, index)
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Tensor) for part in parts):
        return None
    keeps_all = all(part is None or part is Ellipsis or part == slice(None) for part in parts)
    return _reshape(op) if keeps_all else None


def _look_up(op: Operation, index: Tensor) -> View | None:
    """An expert's matrix, or its bias, for each token."""
    view = op.view
    if view.flipped or not view.plain or view.slot or view.ids is not None or op.source.dim() not in (2, 3):
        return None
    return replace(view, ids=index, reshaped=True)


def _select(op: Operation) -> View | None:
    named = dict(zip(("dim", "index"), op.args[1:], strict=False)) | op.kwargs
    index = named.get("index")
    return _take(op, index) if named.get("dim") == 0 and isinstance(index, int) else None


def _take(op: Operation, index: int) -> View | None:
    """The matrix `index` of a fused 3-D parameter, or a row of its 2-D bias."""
    view, dims = op.view, op.source.dim()
    if view.reshaped or view.slot or dims not in (2, 3) or (view.flipped and dims == 2):
        return None
    return replace(view, slot=(index % op.source.shape[0],), shape=view.shape[1:])


def _plus_scalar(op: Operation) -> View | None:
    """`1 + weight`, as in Gemma's norms."""
    is_plus = not op.kwargs and len(op.args) == 2 and any(isinstance(arg, (int, float)) for arg in op.args)
    return op.view if is_plus else None


def _times_one(op: Operation) -> View | None:
    """`1 * weight`: where a product over adapters begins, as in IA3."""
    return _plus_scalar(op) if any(isinstance(arg, (int, float)) and arg == 1 for arg in op.args) else None


def _over(op: Operation) -> View | None:
    """`weight / constant`, entry by entry."""
    view, source = op.view, op.source
    constant = op.args[1] if len(op.args) == 2 and not op.kwargs else None
    if not isinstance(constant, Tensor) or constant.requires_grad or constant.shape != source.shape or view.flipped:
        return None
    if view.ids is not None or op.out.shape != source.shape:
        return None
    gain = 1 / constant.detach().reshape(view.shape)
    return replace(view, gain=gain if view.gain is None else view.gain * gain)


def _minus_scalar(op: Operation) -> View | None:
    """`weight - 1`."""
    return op.view if not op.kwargs and len(op.args) == 2 and isinstance(op.args[1], (int, float)) else None


def _shared_lookup(op: Operation) -> View | None:
    """`F.embedding(ids, weight)` with ids that carry no batch axis, which the embedding's rule therefore left alone."""
    view = op.view
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    named = dict(zip(names, op.args, strict=False)) | op.kwargs
    is_special = named.get("max_norm") or named.get("scale_grad_by_freq") or named.get("padding_idx") is not None
    if view.flipped or not view.plain or view.slot or view.ids is not None or is_special:
        return None
    return replace(view, ids=named["input"], reshaped=True)


Step = Callable[[Operation], "View | None"]

_CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone")
_SHAPES = ("reshape", "unsqueeze", "squeeze", "flatten")

STEPS: dict[Any, Step] = {
    **{getattr(torch.Tensor, name): _same for name in _CASTS},
    **{getattr(home, name): _reshape for home in (torch, torch.Tensor) for name in _SHAPES},
    torch.Tensor.view: _reshape,
    **dict.fromkeys((torch.Tensor.t, torch.t, torch.Tensor.T.__get__), _flip_2d),  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: _flip,  # type: ignore[attr-defined]
    **dict.fromkeys((torch.Tensor.transpose, torch.transpose), _transpose),
    **dict.fromkeys((torch.Tensor.permute, torch.permute), _permute),
    torch.Tensor.__getitem__: _index,
    **dict.fromkeys((torch.Tensor.select, torch.select), _select),
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
    """The view that `out` is, if `source`, one of the call's arguments, is `view`; None where the trail ends."""
    step = STEPS.get(func)
    if step is None or not isinstance(out, Tensor):
        return None
    if step not in (_plus_scalar, _times_one, _shared_lookup) and (not args or args[0] is not source):
        return None
    return step(Operation(view, source, args, kwargs, out))
