"""Collects the forms of every parameter's uses and reduces each parameter as soon as its last use has arrived.

A parameter used several times (a tied embedding and head, a layer called twice) has one gradient, the sum over its
uses, so its forms are added before the inner product and the cross terms count. Only the three scalars of each pair
outlive a reduction.

Letters: k pairs of the running micro-batch, rows 0..k-1 chosen and k..2k-1 rejected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradent.hooks.reduction.merge import (
    first_of,
    gathered,
    merge_forms,
    pair_of_dense,
    row_count,
    rows_of,
    scattered,
    stacked,
)
from gradent.hooks.reduction.small_gradients import Formed, Slot, SmallGradients, is_small, row_gradients
from gradent.hooks.uses.formats import Dense, Explicit, Form, Rows, Solid
from gradent.kernels.common.cost import tile_room
from gradent.kernels.common.numerics import (
    accumulator,
    in_memory_order,
    product_pays,
    reduce_flat,
    reduce_tiles,
    tiles_pay,
)
from gradent.kernels.dispatch import on_kernels, pairs_pay, pairs_together, reduce_pair
from gradent.kernels.with_weight_grad import reduce_shared

__all__ = ["Ledger"]

T = TypeVar("T")

RETRIES = 2
"""How often a reduction that ran out of memory is tried again, in tiles of half the size each time."""


class Ledger:
    """Gram entries of k pairs, parameter by parameter.

    Args:
        pairs: k.
        budget: bytes that the tiles of a reduction may take.
        weight: parameter number -> square root of the metric's diagonal, of the parameter's shape; None for the
            Euclidean metric.

    Attributes:
        entries: parameter number -> `[k, 3]` float64 `(chosen_sq, rejected_sq, inner)`, in the order in which the
            parameters were completed. Complete after `close`: until then, small parameters have an empty tensor.
    """

    def __init__(self, pairs: int, *, budget: int, weight: Callable[[int], Tensor] | None = None) -> None:
        self.entries: dict[int, Tensor] = {}
        self._pairs = pairs
        self._budget = budget
        self._weight = weight
        self._forms: dict[int, dict[int, dict[Slot, list[Form]]]] = defaultdict(dict)
        self._formed: dict[int, list[Formed]] = defaultdict(list)
        self._ahead: dict[int, Tensor] = {}
        self._small = SmallGradients(pairs)
        self._known: dict[tuple[object, ...], tuple[bool, bool]] = {}

    def add_rows(self, param: int, rows: Sequence[int], slot: Slot, grads: Tensor) -> None:
        """Add the gradients of several rows, formed already, to what these rows hold of a parameter.

        Args:
            param: the parameter's number.
            rows: R numbers of rows of the micro-batch, each once.
            slot: what of the parameter they are the gradients of.
            grads: `[R, *shape of the slot]`, in the accumulator's dtype, detached.
        """
        if not rows:
            return
        self._refuse_late(param)
        formed = self._formed[param]
        for place, one in enumerate(formed):
            if one.slot == slot and list(one.rows) == list(rows):  # a layer that is called again
                formed[place] = Formed(rows, slot, one.grads + grads)
                return
        formed.append(Formed(rows, slot, grads))

    def add(self, param: int, row: int, slot: Slot, form: Form) -> None:
        """Add a form to what row `row` holds of a parameter.

        Args:
            param: the parameter's number.
            row: row of the micro-batch, 0 <= row < 2k.
            slot: what of the parameter the form is the gradient of.
            form: the gradient, detached.
        """
        if not isinstance(form, Rows):
            self._refuse_late(param)
        self._forms[param].setdefault(row, {}).setdefault(slot, []).append(form)

    def whole(self, param: int, u: Tensor, v: Tensor, ends: Sequence[int] | None = None, *, beside: int = 0) -> bool:
        """Reduce a parameter of which one product's gradients are all there is, all pairs at once.

        Args:
            param: the parameter's number.
            u: `[2k, T, O]`, rows 0..k-1 chosen and k..2k-1 rejected (the rows `fills`).
            v: `[2k, T, I]`.
            ends: the tokens of each row, where kernels are to leave out the rest, in which u or v is zero; None for T.
            beside: bytes of the budget that are taken meanwhile.

        Returns:
            Whether it is reduced; if not (`fits` is false), its forms are to be added row by row.
        """
        if self._holds(param) or len(u) != 2 * self._pairs:
            return False
        room = self._room - beside
        together = pairs_together(u, v, budget=room, lengths=ends, weight=self._root(param, ())) if room > 0 else None
        if together is None:
            return False
        try:
            entries = together()
        except torch.OutOfMemoryError:
            return False
        self.entries[param] = entries
        return True

    def share(
        self,
        param: int,
        u: Tensor,
        v: Tensor,
        places: Sequence[int],
        factors: Sequence[float],
        look: Callable[[], Sequence[tuple[int, int]] | None] | None,
    ) -> Tensor | None:
        """Reduce a parameter of which one product's gradients are all there is, and add those gradients up.

        Args:
            param: the parameter's number.
            u: `[R, T, O]`, the rows of one forward.
            v: `[R, T, I]`.
            places: each row's number among the 2k, or -1.
            factors: what each row is multiplied by before it is measured.
            look: finds of each row the tokens outside of which u or v is zero; None if that is not certain.

        Returns:
            The sum of all rows' products `[O, I]`; None where not every pair's rows are here, and nothing was done.
        """
        if self._holds(param) or sum(place >= 0 for place in places) != 2 * self._pairs:
            return None
        self.entries[param], total = reduce_shared(
            u,
            v,
            places,
            factors,
            pairs=self._pairs,
            budget=self._room,
            weight=self._root(param, ()),
            look=look,
        )
        return total

    def fills(self, rows: Sequence[int]) -> bool:
        """Whether a forward's rows are those of all pairs, in their order."""
        return len(rows) == 2 * self._pairs and list(rows) == list(range(len(rows)))

    def fits(self, u: Tensor, v: Tensor, *, beside: int = 0) -> bool:
        """Whether all rows' products are here, and worth forming at once; arguments as for `whole`."""
        room = self._room - beside
        return len(u) == 2 * self._pairs and room > 0 and pairs_pay(u, v, budget=room)

    def gathers(self, u: Tensor, v: Tensor) -> bool:
        """Whether products are to be formed as they arrive, and reduced with those of other parameters.

        Args:
            u: `[R, T, O]`.
            v: `[R, T, I]`.

        Returns:
            The answer.
        """
        return self._ways(u, v)[1]

    def folds(self, param: int, u: Tensor, v: Tensor) -> bool:
        """Whether a matrix product's gradients are to be formed as they arrive, and added as such.

        Args:
            param: the parameter's number.
            u: `[R, T, O]`, the rows of one forward.
            v: `[R, T, I]`.

        Returns:
            The answer; no where the parameter holds factors already.
        """
        held = [form for row in self._forms[param].values() for forms in row.values() for form in forms]
        unmixed = all(isinstance(form, Explicit) for form in held)
        return unmixed and self._ways(u, v)[0]

    def _ways(self, u: Tensor, v: Tensor) -> tuple[bool, bool]:
        """Whether a product pays formed, and is then small enough to wait: remembered, for layers are alike."""
        key = u.shape[1:], v.shape[2], u.dtype, v.dtype, u.device, self._budget
        if key not in self._known:
            count = 2 * self._pairs
            pays = product_pays(u, v, count=count, budget=self._budget)
            size = count * u.shape[2] * v.shape[2] * accumulator(u.dtype).itemsize
            self._known[key] = pays, pays and is_small(size, self._budget) and not on_kernels(u, v)
        return self._known[key]

    def finish(self, param: int) -> None:
        """Reduce a parameter, all of whose uses have been added; rows without a form have a zero gradient there.

        Args:
            param: the parameter's number.
        """
        if self._postpone(param):
            return
        entries = self._together(param)
        if entries is None:
            entries = self._pair_by_pair(param, self._pop(param))
        if param in self._ahead:
            entries += self._ahead.pop(param)
        self.entries[param] = entries

    @property
    def _room(self) -> int:
        """What a reduction may take beside the gradients that wait: a quarter of the budget, unless memory ran out."""
        return max(self._budget // 2, self._budget - self._small.held)

    def _postpone(self, param: int) -> bool:
        """Let a parameter of which small gradients were formed wait for others of its kind; whether it does."""
        formed = self._single_slot(param)
        if formed is None or param in self._ahead:
            return False
        if not is_small(sum(one.grads.nbytes for one in formed), self._budget):
            return False
        self._small.add(param, self._formed.pop(param))
        self.entries[param] = torch.zeros(0, 3, dtype=torch.float64)
        if self._small.full(self._budget):
            self._flush()
        return True

    def _flush(self) -> None:
        """Reduce the small parameters that wait."""
        self.entries.update(self._patiently(self._small.reduce, self._root))
        self._small.clear()

    def _single_slot(self, param: int) -> list[Formed] | None:
        """What was formed of a parameter's rows, where that is all there is, and of one slot; else None."""
        formed = self._formed.get(param)
        if not formed or self._forms.get(param) or any(one.slot != formed[0].slot for one in formed):
            return None
        return formed

    def _together(self, param: int) -> Tensor | None:
        """Entries of a parameter of which rows of one slot were formed, small ones, and nothing else; else None."""
        formed = self._single_slot(param)
        if formed is None:
            return None
        first = formed[0]
        if not tiles_pay(first.grads[0], count=2 * self._pairs, budget=self._room):
            return None
        root = self._root(param, first.slot)
        try:
            entries = reduce_tiles(in_memory_order(row_gradients(formed, 2 * self._pairs, root)))
        except torch.OutOfMemoryError:
            return None
        del self._formed[param]
        return entries

    def _holds(self, param: int) -> bool:
        """Whether something of a parameter waits to be reduced."""
        return bool(self._forms.get(param) or self._formed.get(param) or param in self._ahead)

    def _refuse_late(self, param: int) -> None:
        """Only lookups can be added to what `shrink` reduced ahead: products with other forms would be missing."""
        if param in self._ahead:
            raise AssertionError(f"parameter {param} is used again after its head was reduced for the lookups to come")

    def _pop(self, param: int) -> dict[int, dict[Slot, list[Form]]]:
        """Everything that is held of a parameter, row by row, and held here no more."""
        held = self._forms.pop(param, {})
        for one in self._formed.pop(param, []):
            for row, grad in zip(one.rows, one.grads, strict=True):
                held.setdefault(row, {}).setdefault(one.slot, []).append(Explicit(grad))
        return held

    def _pair_by_pair(self, param: int, held: dict[int, dict[Slot, list[Form]]]) -> Tensor:
        totals: list[Tensor | None] = []
        for pair in range(self._pairs):
            chosen, rejected = held.get(pair, {}), held.get(pair + self._pairs, {})
            slots = sorted({*chosen, *rejected})
            sums = [
                self._patiently(self._slot, param, slot, chosen.get(slot, []), rejected.get(slot, [])) for slot in slots
            ]
            totals.append(torch.stack(sums).sum(0) if sums else None)
        some = next((total for total in totals if total is not None), torch.zeros(3, dtype=torch.float64))
        return torch.stack([torch.zeros_like(some) if total is None else total for total in totals])

    def shrink(self, param: int, lookups: Callable[[int], Tensor]) -> None:
        """Reduce a tied weight's dense forms now, and keep only the rows of them that its lookups will touch.

        With E the lookups' gradient and H the head's, `⟨E+H, E'+H'⟩ = ⟨H, H'⟩ + (⟨E+R, E'+R'⟩ − ⟨R, R'⟩)`, R being H on
        the rows that E or E' touches: the head's `[T, V]` cotangents need not be held until the embedding's arrive.

        Args:
            param: the parameter's number; all of its uses but lookups have been added.
            lookups: row -> ids int64 `[T]` that the row's lookups, still to come, will touch.
        """
        held = [(slot, form) for row in self._forms[param].values() for slot, forms in row.items() for form in forms]
        if self._formed.get(param) or any(slot or isinstance(form, Explicit) for slot, form in held):
            return  # used loosely as well, or in parts: everything waits for the last use
        rows_held = self._forms.pop(param)
        ahead = []
        for pair in range(self._pairs):
            rows = (pair, pair + self._pairs)
            sides = [merge_forms(rows_held.get(row, {}).get((), [])) for row in rows]
            dense = [first_of(side, Dense) for side in sides]
            looked = [rows_of(side) for side in sides]
            for row, found in zip(rows, looked, strict=True):
                for form in found:
                    self.add(param, row, (), form)
            if not any(dense):
                ahead.append(torch.zeros(3, dtype=torch.float64))
                continue
            ids = torch.unique(torch.cat([*map(lookups, rows), *(form.ids for side in looked for form in side)]))
            kept = [[] if side is None else [self._patiently(self._kept, side, ids)] for side in dense]
            touched = self._patiently(self._rows, kept[0], kept[1], self._root(param, ()))
            heads = [[] if side is None else [side] for side in dense]
            ahead.append(self._patiently(self._slot, param, (), heads[0], heads[1]) - touched)
            for row, found in zip(rows, kept, strict=True):
                for form in found:
                    self.add(param, row, (), form)
        self._ahead[param] = torch.stack([entry.to(ahead[-1].device) for entry in ahead])

    def close(self) -> None:
        """Reduce what is still open: uses that the backward pass never reached have a zero gradient."""
        for param in [number for number in {**self._forms, **self._formed} if number not in self.entries]:
            self.finish(param)
        self._flush()

    def clear(self) -> None:
        """Let go of every form; entries stay."""
        self._forms.clear()
        self._formed.clear()
        self._ahead.clear()
        self._small.clear()

    def _patiently(self, reduce: Callable[..., T], *operands: Any) -> T:
        """A reduction; where memory runs out, it and what follows go on in tiles of half the size."""
        for _ in range(RETRIES):
            try:
                return reduce(*operands)
            except torch.OutOfMemoryError:
                self._budget = max(1024, self._budget // 2)
            # Outside of the handler, which holds the failed attempt's tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return reduce(*operands)

    def _root(self, param: int, slot: Slot) -> Tensor | None:
        return None if self._weight is None else self._weight(param)[slot]

    def _slot(self, param: int, slot: Slot, chosen: Sequence[Form], rejected: Sequence[Form]) -> Tensor:
        root = self._root(param, slot)
        sides = (merge_forms(chosen), merge_forms(rejected))
        kinds = {type(form) for side in sides for form in side}
        if kinds == {Dense}:
            (u_w, v_w), (u_l, v_l) = pair_of_dense(*sides)
            return reduce_pair(u_w, v_w, u_l, v_l, budget=self._room, weight=root)
        if kinds == {Rows}:
            return self._rows(rows_of(sides[0]), rows_of(sides[1]), root)
        if kinds == {Explicit}:
            return reduce_flat(stacked(first_of(sides[0], Explicit), first_of(sides[1], Explicit), root))
        return self._mixed(sides, root)

    def _kept(self, head: Dense, ids: Tensor) -> Rows:
        """What a head's gradient has on some rows."""
        return Rows(ids, gathered(head, ids, self._room))

    def _rows(self, chosen: Sequence[Rows], rejected: Sequence[Rows], root: Tensor | None) -> Tensor:
        """Gram entries of two sides' lookups, on the rows that either touches, a few columns at a time."""
        forms = [*chosen, *rejected]
        ids = torch.unique(torch.cat([form.ids for form in forms]))
        cols, wide = forms[0].values.shape[1], accumulator(forms[0].values.dtype)
        copied = max(len(ids) if root is not None else 0, *(len(form.ids) for form in forms))  # cut out, or widened
        step = max(1, tile_room(self._room) // max(1, (2 * len(ids) + copied) * wide.itemsize))
        entries = torch.zeros(3, dtype=torch.float64, device=ids.device)
        buffer = torch.empty(2 * len(ids) * min(cols, step), dtype=wide, device=ids.device)
        for start in range(0, cols, step):
            stop = min(cols, start + step)
            tile = buffer[: 2 * len(ids) * (stop - start)].view(2, len(ids), stop - start).zero_()
            for grad, side in zip(tile, (chosen, rejected), strict=True):
                for form in side:
                    grad.index_add_(0, torch.searchsorted(ids, form.ids), form.values[:, start:stop].to(wide))
            if root is not None:
                tile *= root[ids, start:stop]
            entries += reduce_flat(tile.view(2, -1))
        return entries

    def _mixed(self, sides: Sequence[list[Solid]], root: Tensor | None) -> Tensor:
        """Uses of different kinds: every product of two forms, summed. Rare (a weight used loosely as well)."""
        weight = None if root is None else root.square()
        height = max(row_count(form) for side in sides for form in side) if weight is None else weight.shape[0]
        chosen, rejected = (scattered(side, height) for side in sides)
        products = [
            sum((self._product(x, y, weight) for x in left for y in right), torch.zeros((), dtype=torch.float64))
            for left, right in ((chosen, chosen), (rejected, rejected), (chosen, rejected))
        ]
        return torch.stack([torch.as_tensor(product) for product in products])

    def _product(self, x: Dense | Explicit, y: Dense | Explicit, weight: Tensor | None) -> Tensor:
        """`Σ G_x · G_y · weight`, float64 scalar, along the path that opt_einsum finds cheapest under the budget."""
        import opt_einsum  # noqa: PLC0415  (rare, and what else is measured goes without it)

        operands: list[Tensor] = []
        terms: list[str] = []
        for form, token in ((x, "t"), (y, "s")):
            if isinstance(form, Dense):
                operands += [form.u.double(), form.v.double()]
                terms += [f"{token}o", f"{token}i"]
            else:
                operands.append(form.grad.double())
                terms.append("oi" if form.grad.dim() == 2 else "o")
        if weight is not None:
            operands.append(weight.double())
            terms.append("oi" if weight.dim() == 2 else "o")
        limit = max(self._room // 8, max(operand.numel() for operand in operands))
        return torch.as_tensor(opt_einsum.contract(",".join(terms) + "->", *operands, memory_limit=limit))
