"""Sums of one row's forms of a slot: as few forms as can be, and what two rows' sums have to be alike in.

Letters: T tokens, O and I the rows and columns of the slot, n looked-up rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradent.hooks.uses.formats import Deferred, Dense, Explicit, Form, Rows, Solid
from gradent.kernels.common.cost import DEPTH, tile_room
from gradent.kernels.common.numerics import accumulator, put_product, spans

__all__ = ["first_of", "gathered", "merge_forms", "pair_of_dense", "row_count", "rows_of", "scattered", "stacked"]

F = TypeVar("F", Dense, Explicit)


def merge_forms(forms: Sequence[Form]) -> list[Solid]:
    """As few forms as can be made without adding up lookups: sums of gradients.

    Args:
        forms: of one row and slot.

    Returns:
        Their sum as a `Dense`, every `Rows` and an `Explicit`, those of them that there are.
    """
    merged: list[Solid] = []
    solid = [form.make() if isinstance(form, Deferred) else form for form in forms]
    dense = [form for form in solid if isinstance(form, Dense)]
    rows = [form for form in solid if isinstance(form, Rows)]
    explicit = [form for form in solid if isinstance(form, Explicit)]
    if dense:
        one = dense[0]
        merged.append(
            one if len(dense) == 1 else Dense(torch.cat([f.u for f in dense]), torch.cat([f.v for f in dense]))
        )
    merged += rows
    if explicit:
        total = explicit[0].grad.to(accumulator(explicit[0].grad.dtype))
        for form in explicit[1:]:
            total = total + form.grad
        merged.append(Explicit(total))
    return merged


def rows_of(side: Sequence[Solid]) -> list[Rows]:
    """The lookups among a row's merged forms.

    Args:
        side: what `merge_forms` returned.

    Returns:
        All of them.
    """
    return [form for form in side if isinstance(form, Rows)]


def first_of(side: Sequence[Solid], kind: type[F]) -> F | None:
    """The form of a kind among a row's merged forms, of which there is one at most.

    Args:
        side: what `merge_forms` returned.
        kind: the form's type.

    Returns:
        The form, or None.
    """
    return next((form for form in side if isinstance(form, kind)), None)


def pair_of_dense(chosen: list[Solid], rejected: list[Solid]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The factors of two rows, of which at least one has a `Dense`; of no token where the other has none.

    Args:
        chosen: what `merge_forms` returned for the chosen row.
        rejected: the same of the rejected row.

    Returns:
        `((u_w, v_w), (u_l, v_l))`.
    """
    one, other = first_of(chosen, Dense), first_of(rejected, Dense)
    some = one or other
    assert some is not None
    empty = Dense(some.u[:0], some.v[:0])
    one, other = one or empty, other or empty
    return (one.u, one.v), (other.u, other.v)


def stacked(chosen: Explicit | None, rejected: Explicit | None, root: Tensor | None) -> Tensor:
    """The explicit gradients of two rows, of which at least one has one, in the accumulator's dtype.

    Args:
        chosen: the chosen row's.
        rejected: the rejected row's.
        root: multiplies both, entry by entry; None for 1.

    Returns:
        `[2, entries of the slot]`.
    """
    some = chosen or rejected
    assert some is not None
    wide = accumulator(some.grad.dtype)
    grads = [torch.zeros_like(some.grad) if side is None else side.grad for side in (chosen, rejected)]
    tile = torch.stack([grad.to(wide) for grad in grads])
    if root is not None:
        tile *= root
    return tile.view(2, -1)


def gathered(dense: Dense, ids: Tensor, budget: int) -> Tensor:
    """Some rows of a `Dense`'s gradient `uᵀv`.

    Args:
        dense: factors `[T, O]` and `[T, I]`.
        ids: int64 `[n]`.
        budget: bytes that columns of u, and what has to be widened, may take beside the result.

    Returns:
        `[n, I]`, in the accumulator's dtype.
    """
    u, v, wide = dense.u, dense.v, accumulator(dense.u.dtype)
    room, (tokens, cols) = tile_room(budget), v.shape
    widened = 0 if u.dtype == v.dtype == wide else DEPTH * wide.itemsize  # bytes for each row and column of a product
    width = min(cols, max(1, room // (4 * max(1, widened))))
    height = max(1, (room - widened * width) // max(1, tokens * u.element_size() + widened))
    found = torch.empty(len(ids), cols, dtype=wide, device=u.device)
    for some in spans(len(ids), height):
        part = u[:, ids[some]]
        for left in spans(cols, width):
            put_product(part, v[:, left], DEPTH, found[some, left])
        del part  # or two of them would be held
    return found


def row_count(form: Solid) -> int:
    """Rows of the slot, as far as a form tells (a lookup tells the last that it touches).

    Args:
        form: any.

    Returns:
        The number of rows.
    """
    if isinstance(form, Dense):
        return form.u.shape[1]
    if isinstance(form, Rows):
        return int(form.ids.max()) + 1 if form.ids.numel() else 0
    return form.grad.shape[0]


def scattered(side: Sequence[Solid], height: int) -> list[Dense | Explicit]:
    """A row's merged forms, with the sum of all its lookups as an `Explicit`.

    Args:
        side: what `merge_forms` returned.
        height: rows of the slot.

    Returns:
        A form of each kind, at most.
    """
    forms: list[Dense | Explicit] = [form for form in side if not isinstance(form, Rows)]
    lookups = rows_of(side)
    if lookups:
        values = lookups[0].values
        total = values.new_zeros(height, values.shape[1], dtype=accumulator(values.dtype))
        for form in lookups:
            total.index_add_(0, form.ids, form.values.to(total.dtype))
        forms.append(Explicit(total))
    return forms
