"""Whether the tokens of a flattened operand `[R L, features]` are in the batch's order, row after row.

They are where it is a view of something `[R, L, ...]`, or was computed from one without picking positions. A mixture of
experts picks: an expert that happens to be given every token has as many of them, in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["PICKS", "PUTS", "in_order", "is_view", "moves_rows"]

PICKS = {
    f"{name}Backward0"
    for name in ("Index", "IndexSelect", "Gather", "Take", "MaskedSelect", "Sort", "Topk", "Roll", "Flip", "Embedding")
}
"""Nodes of operators that hand out positions of their input in an order of their own."""

PUTS = {
    f"{name}Backward0"
    for name in ("IndexAdd", "IndexPut", "IndexPutImpl", "IndexCopy", "ScatterAdd", "Scatter", "MaskedScatter")
}
"""Nodes of operators that put positions where they belong."""


def in_order(tensor: Tensor, rows: int, length: int, known: set[Node]) -> bool:
    """Whether the tokens of `[R L, features]` are in the batch's order; `known` caches nodes that are."""
    node = tensor.grad_fn
    if node is None:
        base = tensor._base if tensor._is_view() else None  # noqa: SLF001  (torch has no public name for it)
        return base is not None and base.shape[:2] == (rows, length)
    passed = []
    for origin in _walk(node, lambda node: node in known or node.name() in PUTS or is_view(node, rows, length)):
        if origin.name() in PICKS:
            return False
        passed.append(origin)
    known.update(passed)
    return True


def _walk(start: Node, stops: Callable[[Node], bool]) -> Iterator[Node]:
    """The nodes below `start`, each once; a node that `stops` ends its branch."""
    seen, pending = {start}, [start]
    while pending:
        node = pending.pop()
        if stops(node):
            continue
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


def is_view(node: Node, rows: int, length: int) -> bool:
    """Whether a node is that of a view of `[R, L, ...]`."""
    sizes = getattr(node, "_saved_self_sym_sizes", ())
    return "View" in node.name() and tuple(map(int, sizes[:2])) == (rows, length) and len(sizes) > 2


def moves_rows(root: Tensor) -> bool:
    """Whether an operator in the graph below a tensor moves the first axis, as for activations `[L, R, ...]`."""
    return root.grad_fn is not None and any(map(_moves_first, _walk(root.grad_fn, lambda node: False)))


def _moves_first(node: Node) -> bool:
    if "Permute" in node.name():
        return int(getattr(node, "_saved_dims", (1,))[0]) != 0
    return "Transpose" in node.name() and 0 in (int(getattr(node, f"_saved_dim{side}", 0)) for side in (0, 1))
