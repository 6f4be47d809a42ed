"""One group's entries from the formats in which its rows' gradients of one slot are held.

Letters: n rows of the group, T tokens, O and I the rows and columns of the slot, D directions, m entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradent.hooks.uses.formats import Factored, Form, LazyFactored, Materialized, Solid, SparseRows
from gradent.kernels.common.account import AccountSums
from gradent.kernels.common.budget import tile_room
from gradent.kernels.common.cost import DEPTH, cheapest
from gradent.kernels.common.numerics import Factors, accumulator, dots, put_product, reduce_flat, spans
from gradent.kernels.common.precision import exact_products
from gradent.kernels.common.wanted import pick
from gradent.kernels.dispatch import account_group, reduce_group
from gradent.kernels.outer.reference import Place, account_all_rows, account_tiled, reduce_tiled

__all__ = ["account_forms", "gathered", "merge_forms", "reduce_forms", "reduce_sparse"]


def merge_forms(forms: Sequence[Form]) -> list[Solid]:
    """The sum of one row's formats in as few as can be: at most one `Factored` and one `Materialized`, all lookups."""
    solid = [form.make() if isinstance(form, LazyFactored) else form for form in forms]
    factored = [form for form in solid if isinstance(form, Factored)]
    merged: list[Solid] = [*factored[:1]]
    if len(factored) > 1:
        merged = [Factored(torch.cat([form.u for form in factored]), torch.cat([form.v for form in factored]))]
    merged += [form for form in solid if isinstance(form, SparseRows)]
    grads = [form.grad for form in solid if isinstance(form, Materialized)]
    if grads:
        total = grads[0].to(accumulator(grads[0].dtype))
        for grad in grads[1:]:
            total = total + grad
        merged.append(Materialized(total))
    return merged


def reduce_forms(
    rows: Sequence[Sequence[Form]], *, budget: int, root: Tensor | None = None, directions: Tensor | None = None
) -> Tensor:
    """Entries `[m]` float64 of n rows, each the sum of its formats; `root` multiplies gradients and directions."""
    sides = [merge_forms(forms) for forms in rows]
    kinds = {type(form) for side in sides for form in side}
    if kinds == {Factored}:
        return reduce_group(_factors(sides), budget=budget, weight=root, directions=directions)
    if kinds == {SparseRows}:
        lookups = [[form for form in side if isinstance(form, SparseRows)] for side in sides]
        return reduce_sparse(lookups, budget=budget, root=root, directions=directions)
    if kinds == {Materialized}:
        return _reduce_materialized(sides, root, directions)
    return _reduce_mixed(sides, budget, root, directions)


def _factors(sides: Sequence[Sequence[Solid]]) -> Factors:
    """The factors of every row, of no tokens where it has none; none of them has another format."""
    factored = [next((form for form in side if isinstance(form, Factored)), None) for side in sides]
    first = next(form for form in factored if form is not None)
    return [(first.u[:0], first.v[:0]) if form is None else (form.u, form.v) for form in factored]


def _filled(sides: Sequence[Sequence[Solid]]) -> list[Tensor]:
    """Every row's materialized gradient, zero where it has none."""
    grads = [next((form.grad for form in side if isinstance(form, Materialized)), None) for side in sides]
    some = next(grad for grad in grads if grad is not None)
    return [torch.zeros_like(some) if grad is None else grad for grad in grads]


def account_forms(rows: Sequence[Sequence[Form]], sums: AccountSums, *, budget: int) -> Tensor:
    """Entries `[M]` of a step's account from all rows, each the sum of its formats."""
    sides = [merge_forms(forms) for forms in rows]
    kinds = {type(form) for side in sides for form in side}
    if kinds == {Factored}:
        return account_group(_factors(sides), sums, budget=budget)
    if kinds == {SparseRows}:
        return _account_sparse([[f for f in side if isinstance(f, SparseRows)] for side in sides], sums, budget)
    if kinds == {Materialized}:
        return account_all_rows(torch.stack(_filled(sides)), sums)
    wide, device, shape, put = _prepare_mixed(sides)
    extra = sums.beside
    tiling = cheapest([0] * len(sides), *shape, itemsize=wide.itemsize, budget=budget, weighted=True, directions=extra)
    with exact_products(device):
        return account_tiled(put, len(sides), shape, tiling.tile, wide, device, sums.reshaped(_matrix))


def _account_sparse(rows: Sequence[Sequence[SparseRows]], sums: AccountSums, budget: int) -> Tensor:
    """Entries `[M]` of all rows' lookups, on the rows of the weight that any touches, a few columns at a time."""
    forms = [form for side in rows for form in side]
    ids = torch.unique(torch.cat([form.ids for form in forms]))
    cols, wide = forms[0].values.shape[1], accumulator(*(form.values.dtype for form in forms))
    height = len(rows) * len(ids)
    copied = max(sums.beside * len(ids), *(len(form.ids) for form in forms))  # cut out, or widened
    step = max(1, tile_room(budget) // max(1, (height + copied) * wide.itemsize))
    buffer = torch.empty(height * min(cols, step), dtype=wide, device=ids.device)
    for span in spans(cols, step):
        width = span.stop - span.start
        tile = buffer[: height * width].view(len(rows), len(ids), width).zero_()
        for grad, side in zip(tile, rows, strict=True):
            for form in side:
                grad.index_add_(0, torch.searchsorted(ids, form.ids), form.values[:, span].to(wide))
        sums.add(tile, (ids, span))
    return sums.entries


def reduce_sparse(
    rows: Sequence[Sequence[SparseRows]], *, budget: int, root: Tensor | None = None, directions: Tensor | None = None
) -> Tensor:
    """Entries `[m]` of n rows' lookups, on the rows of the weight that any of them touches, a few columns at a time."""
    forms = [form for side in rows for form in side]
    ids = torch.unique(torch.cat([form.ids for form in forms]))
    cols, wide = forms[0].values.shape[1], accumulator(*(form.values.dtype for form in forms))
    extra = 0 if directions is None else len(directions)
    height = (len(rows) + extra) * len(ids)
    cut_out = len(ids) if root is not None or extra else 0
    copied = max(cut_out, *(len(form.ids) for form in forms))  # the forms' are widened
    step = max(1, tile_room(budget) // max(1, (height + copied) * wide.itemsize))
    gram = torch.zeros(len(rows) + extra, len(rows), dtype=torch.float64, device=ids.device)
    buffer = torch.empty(height * min(cols, step), dtype=wide, device=ids.device)
    for span in spans(cols, step):
        width = span.stop - span.start
        tile = buffer[: height * width].view(len(rows) + extra, len(ids), width).zero_()
        for grad, side in zip(tile, rows, strict=False):
            for form in side:
                grad.index_add_(0, torch.searchsorted(ids, form.ids), form.values[:, span].to(wide))
        if directions is not None:
            tile[len(rows) :] = directions[:, ids, span]
        if root is not None:
            tile *= root[ids, span]
        flat = tile.view(len(rows) + extra, -1)
        gram += dots(flat, flat[: len(rows)])
    return pick(gram, len(rows))


def _reduce_materialized(sides: Sequence[Sequence[Solid]], root: Tensor | None, directions: Tensor | None) -> Tensor:
    """Entries `[m]` of gradients that are there as such, put side by side."""
    grads = _filled(sides)
    tile = torch.stack([*grads, *([] if directions is None else directions.to(grads[0].dtype))])
    if root is not None:
        tile *= root
    return reduce_flat(tile.view(len(tile), -1), len(grads))


def _reduce_mixed(
    sides: Sequence[Sequence[Solid]], budget: int, root: Tensor | None, directions: Tensor | None
) -> Tensor:
    """Entries `[m]` of rows that hold several formats, in tiles of the weight to which each format adds its part."""
    wide, device, shape, put = _prepare_mixed(sides)
    extra = 0 if directions is None else len(directions)
    tiling = cheapest([0] * len(sides), *shape, itemsize=wide.itemsize, budget=budget, weighted=True, directions=extra)

    root = None if root is None else _matrix(root)
    along = None if directions is None else torch.stack([_matrix(direction) for direction in directions])
    with exact_products(device):
        return reduce_tiled(put, len(sides), shape, tiling.tile, wide, device, root, along)


def _prepare_mixed(
    sides: Sequence[Sequence[Solid]],
) -> tuple[torch.dtype, torch.device, tuple[int, int], Callable[[int, Place, Tensor], None]]:
    """Dtype, device and shape of rows' tiles, and what writes one."""
    forms = [form for side in sides for form in side]

    def put(row: int, place: Place, out: Tensor) -> None:
        out.zero_()
        for form in sides[row]:
            _add_tile(form, place, out)

    wide = accumulator(*(_values(form).dtype for form in forms))
    return wide, _values(forms[0]).device, _shape(forms), put


def _add_tile(form: Solid, place: Place, out: Tensor) -> None:
    """Add a format's part of a tile."""
    top, left = place
    if isinstance(form, Factored):
        for span in spans(len(form.u), DEPTH):
            out.addmm_(form.u[span, top].to(out.dtype).T, form.v[span, left].to(out.dtype))
    elif isinstance(form, SparseRows):
        inside = (form.ids >= top.start) & (form.ids < top.stop)
        out.index_add_(0, form.ids[inside] - top.start, form.values[inside][:, left].to(out.dtype))
    else:
        out += _matrix(form.grad)[top, left]


def _values(form: Solid) -> Tensor:
    return form.u if isinstance(form, Factored) else form.values if isinstance(form, SparseRows) else form.grad


def _matrix(grad: Tensor) -> Tensor:
    """A gradient of any shape as a matrix."""
    return grad.reshape(1, -1) if grad.dim() < 2 else grad.flatten(1)


def _shape(forms: Sequence[Solid]) -> tuple[int, int]:
    """The slot as a matrix, large enough for every format: a lookup does not say how many rows there are."""
    height = width = 1
    for form in forms:
        if isinstance(form, Factored):
            size = form.u.shape[1], form.v.shape[1]
        elif isinstance(form, SparseRows):
            size = int(form.ids.max()) + 1 if form.ids.numel() else 1, form.values.shape[1]
        else:
            size = tuple(_matrix(form.grad).shape)  # type: ignore[assignment]
        height, width = max(height, size[0]), max(width, size[1])
    return height, width


def gathered(head: Factored, ids: Tensor, budget: int) -> Tensor:
    """Rows `ids` `[n]` of a gradient `uᵀv`, `[n, I]` wide; columns of u, and what is widened, are within the budget."""
    u, v, wide = head.u, head.v, accumulator(head.u.dtype, head.v.dtype)
    room, (tokens, cols) = tile_room(budget), v.shape
    widened = 0 if u.dtype == v.dtype == wide else DEPTH * wide.itemsize  # bytes for each row and column of a product
    width = min(cols, max(1, room // (4 * max(1, widened))))
    height = max(1, (room - widened * width) // max(1, tokens * u.element_size() + widened))
    rows = torch.empty(len(ids), cols, dtype=wide, device=u.device)
    for some in spans(len(ids), height):
        part = u[:, ids[some]]
        for left in spans(cols, width):
            put_product(part, v[:, left], DEPTH, rows[some, left])
        del part  # or two of them would be held
    return rows
