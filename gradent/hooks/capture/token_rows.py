"""Which row each token of an operand belongs to, where the model has picked its tokens: a mixture's dispatch.

The operators that pick (`x[token]`, `x.index_select`, `repeat_interleave`, `repeat`) are noted as the model calls them,
each with the rows of the tokens that it hands out. From an operand, the graph is then walked down to them. Rows do not
mix in a model that is measured, so one operand of an elementwise operator tells for all of them.

Letters: R rows of the forward, n tokens of an operand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradent.hooks.capture.row_order import PICKS, PUTS, in_order, is_view
from gradent.hooks.uses.layout import Layout

__all__ = ["PICKERS", "TokenRows"]


class _Unknown:
    """Tokens were moved, and nothing says where to."""


_UNKNOWN: Final = _Unknown()
_Found = Tensor | _Unknown | None
"""Rows of the tokens, int64 `[n]`; None where they were not moved, or have no data in them."""


def _index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`x[index]`, `x[index, ...]` with an index of whole numbers or of truth values."""
    index = args[1] if len(args) == 2 and not kwargs else None
    if isinstance(index, tuple) and index and index[0] is None:  # an axis of one in front of the tokens'
        index = index[1:]
    if isinstance(index, tuple) and index and all(part is Ellipsis or part == slice(None) for part in index[1:]):
        index = index[0]
    if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point():
        return None
    return index.nonzero()[:, 0] if index.dtype == torch.bool else index


def _index_select(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`index_select(x, 0, index)`."""
    named = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
    return named["index"] if named.get("dim") == 0 and isinstance(named.get("index"), Tensor) else None


def _repeat_interleave(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`repeat_interleave(x, times, dim=0)`."""
    named = dict(zip(("input", "repeats", "dim"), args, strict=False)) | kwargs
    times = named.get("repeats")
    if named.get("dim") != 0 or not isinstance(times, int):
        return None
    return torch.arange(len(args[0]), device=args[0].device).repeat_interleave(times)


def _repeat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`x.repeat(times, 1)`."""
    times = args[1:] if len(args) > 2 else args[1] if len(args) == 2 else ()
    if kwargs or not isinstance(times, (tuple, list)) or len(times) != args[0].dim() or any(t != 1 for t in times[1:]):
        return None
    return torch.arange(len(args[0]), device=args[0].device).repeat(times[0])


PICKERS: Mapping[Any, Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]] = {
    torch.Tensor.__getitem__: _index,
    torch.index_select: _index_select,
    torch.Tensor.index_select: _index_select,
    torch.repeat_interleave: _repeat_interleave,
    torch.Tensor.repeat_interleave: _repeat_interleave,
    torch.Tensor.repeat: _repeat,
}
"""What hands out tokens: torch function -> from its arguments, the numbers of those that it hands out."""


class TokenRows:
    """The picks of one forward."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._found: dict[Node, _Found] = {}
        self._loose: dict[int, tuple[Tensor, _Found]] = {}  # picks that require no gradient, by id
        self._ordered: set[Node] = set()
        self._has_picks = False

    @cached_property
    def _rows(self) -> Tensor:
        """The row of every token of the batch, flattened, int64; -1 for none."""
        batch, length = self._layout.shape
        rows = torch.full((batch * length,), -1)
        ends = [start + self._layout.length for start in self._layout.starts]
        if self._layout.packed is not None:
            ends = [stop for _, stop in self._layout.packed.spans]
        for row, (start, stop) in enumerate(zip(self._layout.starts, ends, strict=True)):
            rows[start:stop] = row
        return rows

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A call of a picker has returned."""
        if not args or not isinstance(args[0], Tensor) or not isinstance(out, Tensor) or args[0].dim() < 2:
            return
        if not args[0].is_floating_point():
            return
        rows = self._picked(PICKERS[func](args, kwargs), args[0])
        if rows is None:
            return
        self._has_picks = True
        if out.grad_fn is None:
            self._loose[id(out)] = (out, rows)
        else:
            self._found[out.grad_fn] = rows

    def mark(self, out: Tensor, rows: Tensor) -> None:
        """A product of tokens of these rows."""
        if out.grad_fn is not None and self._layout.rows > 1:
            self._found[out.grad_fn] = rows

    def _picked(self, tokens: Tensor | None, source: Tensor) -> _Found:
        """The rows of what is picked; None where that is no picking of tokens."""
        if tokens is None:
            return None
        before = self._trace(source)
        if before is None and source.shape[0] == len(self._rows):
            if self._rows.device != tokens.device:
                self.__dict__["_rows"] = self._rows.to(tokens.device)
            is_base = source.dim() == 2 and in_order(source, *self._layout.shape, self._ordered)
            before = self._rows if is_base else _UNKNOWN
        if not isinstance(before, Tensor) or len(before) != source.shape[0]:
            return _UNKNOWN if isinstance(before, _Unknown) else None
        return before[tokens]

    def of(self, operand: Tensor) -> Tensor | None:
        """Rows of an operand's tokens, its leading axes flattened, int64 `[n]`, -1 for none; None where unknown."""
        if self._layout.rows == 1:
            return torch.zeros(operand.shape[:-1].numel(), dtype=torch.int64, device=operand.device)
        found = self._trace(operand) if self._has_picks else None
        return found if isinstance(found, Tensor) and len(found) == operand.shape[:-1].numel() else None

    def moved(self, operand: Tensor) -> bool:
        """Whether an operand's tokens are not in the batch's order, as they were picked."""
        rows = self.of(operand) if self._has_picks else None
        return rows is not None and not (len(rows) == len(self._rows) and torch.equal(rows, self._rows))

    def _trace(self, operand: Tensor) -> _Found:
        if operand.grad_fn is None:
            base = operand._base if operand._is_view() else operand  # noqa: SLF001  (torch has no public name for it)
            held = self._loose.get(id(operand)) or self._loose.get(id(base))
            return None if held is None else held[1]
        pending = [operand.grad_fn]
        while pending:
            node = pending[-1]
            if node in self._found:
                pending.pop()
                continue
            if node.name() in PUTS or is_view(node, *self._layout.shape):
                self._found[node] = None
                continue
            below = [child for child, _ in node.next_functions if child is not None]
            unseen = [child for child in below if child not in self._found]
            if unseen:
                pending += unseen
                continue
            found = _joined([self._found[child] for child in below])
            if any(part in node.name() for part in ("Sum", "Mean")):
                found = None  # of several tokens, or of a token's features
            self._found[node] = _UNKNOWN if found is not None and _moves_tokens(node) else found
        return self._found[operand.grad_fn]

    def clear(self) -> None:
        """Let go of the graph."""
        self._found.clear()
        self._loose.clear()
        self._ordered.clear()


def _joined(parts: list[_Found]) -> _Found:
    """What the operands of one operator say of its result."""
    rows = [part for part in parts if isinstance(part, Tensor)]
    if not rows:
        return next((part for part in parts if part is not None), None)
    first = rows[0]
    is_one = all(one is first or (one.shape == first.shape and torch.equal(one, first)) for one in rows[1:])
    return first if is_one else _UNKNOWN


def _moves_tokens(node: Node) -> bool:
    """Whether an operator moves what lies along the first axis."""
    name = node.name()
    if name in PICKS:
        return True
    if "Permute" in name:
        return int(getattr(node, "_saved_dims", (1,))[0]) != 0
    if "Transpose" in name:
        return 0 in (int(getattr(node, f"_saved_dim{side}", 0)) for side in (0, 1))
    if name.startswith(("Slice", "Split", "Cat", "Unbind", "Narrow", "Stack", "Unfold")):
        return int(getattr(node, "_saved_dim", 0)) == 0
    return False
