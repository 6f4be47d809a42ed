"""Sums of one row's forms of a slot: at most one form of each kind, and what two rows' sums have to be alike in.

Letters: T tokens, O and I the rows and columns of the slot, n looked-up rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gradent.hooks.forms import Deferred, Dense, Explicit, Form, Rows, Solid
from gradent.kernels.reference import accumulator

__all__ = ["first_of", "gathered", "merge_forms", "pair_of_dense", "row_count", "stacked"]

F = TypeVar("F", Dense, Rows, Explicit)


def merge_forms(forms: Sequence[Form]) -> list[Solid]:
    """At most one form of each kind: sums of gradients.

    Args:
        forms: of one row and slot.

    Returns:
        Their sum as a `Dense`, a `Rows` and an `Explicit`, those of them that there are.
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
    if rows:
        wide = [form.values.to(accumulator(form.values.dtype)) for form in rows]
        merged.append(rows[0] if len(rows) == 1 else Rows(torch.cat([f.ids for f in rows]), torch.cat(wide)))
    if explicit:
        total = explicit[0].grad.to(accumulator(explicit[0].grad.dtype))
        for form in explicit[1:]:
            total = total + form.grad
        merged.append(Explicit(total))
    return merged


def first_of(side: list[Solid], kind: type[F]) -> F | None:
    """The form of a kind among a row's merged forms.

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


def gathered(dense: Solid, ids: Tensor) -> Tensor:
    """Some rows of a `Dense`'s gradient `uᵀv`.

    Args:
        dense: a `Dense`.
        ids: int64 `[n]`.

    Returns:
        `[n, I]`, in the accumulator's dtype.
    """
    assert isinstance(dense, Dense)
    wide = accumulator(dense.u.dtype)
    return dense.u[:, ids].to(wide).T @ dense.v.to(wide)


def row_count(form: Solid) -> int:
    """Rows of the slot, as far as a form tells (a lookup tells the last that it touches).

    Args:
        form: any.

    Returns:
        The number of rows.
    """
    if isinstance(form, Dense):
        return form.u.shape[1]
    return int(form.ids.max()) + 1 if isinstance(form, Rows) else form.grad.shape[0]
