"""Every inner product between rows, not only those of pairs.

Letters: R rows of the running micro-batch, O and I the two sides of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.reduction.merge import merge_forms
from gradent.hooks.uses.formats import Dense, Explicit, Form, Rows
from gradent.kernels.common.numerics import accumulator, spans
from gradent.kernels.common.precision import exact_products
from gradent.tokens.contractions import products

__all__ = ["AllPairsLedger"]


class AllPairsLedger(Ledger):
    """Gram matrices of R rows, parameter by parameter, from tiles of all rows' gradients beside each other."""

    def __init__(self, rows: int, *, budget: int) -> None:
        super().__init__(0, budget=budget)
        self._rows_count = rows

    def whole(self, param: int, u: Tensor, v: Tensor, ends: Sequence[int] | None = None, *, beside: int = 0) -> bool:
        """Never: every row is kept until the parameter is complete."""
        return False

    def fits(self, u: Tensor, v: Tensor, *, beside: int = 0) -> bool:
        """Never; see `whole`."""
        return False

    def folds(self, param: int, u: Tensor, v: Tensor) -> bool:
        """Never; see `whole`."""
        return False

    def shrink(self, param: int, lookups: Callable[[int], Tensor]) -> None:
        """Nothing is reduced ahead: a tied head waits for the embedding."""

    def finish(self, param: int) -> None:
        """Reduce a parameter."""
        held = self._pop(param)
        total = torch.zeros(self._rows_count, self._rows_count, dtype=torch.float64)
        for slot in sorted({slot for row in held.values() for slot in row}):
            rows = [row for row in sorted(held) if slot in held[row]]
            part = self._slot_matrix([merge_forms(held[row][slot]) for row in rows])
            at = torch.tensor(rows)
            total[at[:, None], at[None]] += part.cpu()
        self.entries[param] = total

    def _slot_matrix(self, rows: Sequence[Sequence[Form]]) -> Tensor:
        """`⟨G_r, G_s⟩` of rows that have a gradient of one slot, `[n, n]` float64."""
        first = rows[0][0]
        values = first.u if isinstance(first, Dense) else first.values if isinstance(first, Rows) else None
        like = values if values is not None else _grad(first)
        wide = accumulator(like.dtype)
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=like.device)
        height, width = _shape(rows)
        room = max(1, self._budget // (2 * wide.itemsize * len(rows)))
        columns = min(width, room)
        lines = max(1, min(height, room // columns))
        for top in spans(height, lines):
            for left in spans(width, columns):
                with exact_products(like.device):
                    tile = torch.stack([_tile(forms, top, left, wide) for forms in rows])
                    gram += products(tile, tile)
        return gram


def _shape(rows: Sequence[Sequence[Form]]) -> tuple[int, int]:
    """The slot as a matrix, large enough for every form (a lookup alone does not say how many rows there are)."""
    height = width = 1
    for forms in rows:
        for form in forms:
            if isinstance(form, Dense):
                size = form.u.shape[1], form.v.shape[1]
            elif isinstance(form, Rows):
                size = int(form.ids.max()) + 1 if form.ids.numel() else 1, form.values.shape[1]
            else:
                grad = _grad(form)
                size = (1, grad.numel()) if grad.dim() < 2 else (grad.shape[0], grad[0].numel())
            height, width = max(height, size[0]), max(width, size[1])
    return height, width


def _grad(form: Form) -> Tensor:
    assert isinstance(form, Explicit)
    return form.grad


def _tile(forms: Sequence[Form], top: slice, left: slice, dtype: torch.dtype) -> Tensor:
    """A row's gradient in one tile, flattened."""
    total: Tensor | None = None
    for form in forms:
        if isinstance(form, Dense):
            part = form.u[:, top].to(dtype).T @ form.v[:, left].to(dtype)
        elif isinstance(form, Rows):
            inside = (form.ids >= top.start) & (form.ids < top.stop)
            values = form.values[inside][:, left].to(dtype)
            part = values.new_zeros(top.stop - top.start, values.shape[1])
            part.index_add_(0, form.ids[inside] - top.start, values)
        else:
            grad = _grad(form)
            part = (grad.reshape(1, -1) if grad.dim() < 2 else grad.flatten(1))[top, left].to(dtype)
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(-1)
