"""Holds the formats of every parameter's uses and reduces each parameter as soon as its last use has arrived.

A parameter used several times (a tied embedding and head, a layer called twice) has one gradient, the sum over its
uses, so its formats are added before the inner product and the cross terms count. Only the entries outlive a reduction.

Letters: N rows of the running micro-batch, M entries, m of one group, D directions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradent.hooks.reduction.merge import gathered, merge_forms, reduce_forms
from gradent.hooks.reduction.small_gradients import MaterializedRows, Slot, SmallGradientQueue, row_gradients
from gradent.hooks.uses.formats import Factored, Form, Materialized, SparseRows
from gradent.kernels.common.numerics import reduce_tiles
from gradent.kernels.common.wanted import Wanted
from gradent.kernels.dispatch import reduce_at_once
from gradent.kernels.strategy import Product, Strategy, decide

__all__ = ["Ledger"]

T = TypeVar("T")

RETRIES = 2
"""How often a reduction that ran out of memory is tried again, in tiles of half the size each time."""


class Ledger:
    """Entries of N rows; `weight` gives a parameter's root of the metric, of its shape, `directions` `[D, *shape]`."""

    def __init__(
        self,
        wanted: Wanted,
        *,
        budget: int,
        weight: Callable[[int], Tensor] | None = None,
        directions: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.wanted = wanted
        self.budget = budget
        self.entries: dict[int, Tensor] = {}
        """Parameter number -> `[M]` float64, as they were completed. Until `close`, small ones have an empty tensor."""
        self.reused = 0
        """Parameters whose summed gradient was handed to a trainer's backward."""
        self._weight, self._directions = weight, directions
        self._forms: dict[int, dict[int, dict[Slot, list[Form]]]] = defaultdict(dict)
        self._materialized: dict[int, list[MaterializedRows]] = defaultdict(list)
        self._ahead: dict[int, Tensor] = {}
        self._queue = SmallGradientQueue(wanted)

    def add_rows(self, param: int, rows: Sequence[int], slot: Slot, grads: Tensor) -> None:
        """Add gradients `[R, *shape of the slot]`, wide and detached, to what R different rows hold of a parameter."""
        if not rows:
            return
        self._refuse_late(param)
        parts = self._materialized[param]
        for place, part in enumerate(parts):
            if part.slot == slot and list(part.rows) == list(rows):  # a layer that is called again
                parts[place] = MaterializedRows(rows, slot, part.grads + grads)
                return
        parts.append(MaterializedRows(rows, slot, grads))

    def add(self, param: int, row: int, slot: Slot, form: Form) -> None:
        """Add a detached gradient of a slot to what a row holds of a parameter."""
        if not isinstance(form, SparseRows):
            self._refuse_late(param)
        self._forms[param].setdefault(row, {}).setdefault(slot, []).append(form)

    def reduce_factored(
        self, param: int, u: Tensor, v: Tensor, strategy: Strategy, lengths: Sequence[int] | None
    ) -> Tensor | None:
        """Entries `[M]` of a parameter whose factors of all rows these are; None where a kernel fails."""
        root, directions = self.metric(param, ())
        return reduce_at_once(strategy, u, v, self.wanted, lengths=lengths, weight=root, directions=directions)

    @property
    def can_wait(self) -> bool:
        """Whether small gradients may be reduced later than they arrive."""
        return True

    @property
    def waiting(self) -> int:
        """Bytes of small gradients that wait to be reduced."""
        return self._queue.held

    @property
    def is_weighted(self) -> bool:
        """Whether a metric multiplies the gradients."""
        return self._weight is not None

    def metric(self, param: int, slot: Slot) -> tuple[Tensor | None, Tensor | None]:
        """What multiplies a slot's gradients, and the directions `[D, *shape of the slot]`; None for none."""
        index: tuple[Any, ...] = (slice(None), *slot)
        directions = None if self._directions is None else self._directions(param)[index]
        return None if self._weight is None else self._weight(param)[slot], directions

    def holds(self, param: int) -> bool:
        """Whether something of a parameter waits to be reduced."""
        return bool(self._forms.get(param) or self._materialized.get(param) or param in self._ahead)

    def has_factors(self, param: int) -> bool:
        """Whether a parameter holds other formats than materialized ones."""
        held = [form for row in self._forms.get(param, {}).values() for forms in row.values() for form in forms]
        return not all(isinstance(form, Materialized) for form in held)

    def finish(self, param: int) -> None:
        """Reduce a parameter, all of whose uses have been added; rows without a format have a zero gradient there."""
        entries, parts = None, self._single_slot(param)
        if parts is not None and param not in self._ahead:
            reducer = decide(self._product(parts), self.budget).reducer
            if reducer == "queue" and self.can_wait:
                self._queue.add(param, self._materialized.pop(param))
                self.entries[param] = torch.zeros(0, dtype=torch.float64)
                if self._queue.is_full(self.budget):
                    self._flush()
                return
            if reducer in ("materialize", "queue"):
                entries = self._all_rows(param, parts)
        if entries is None:
            entries = self._group_by_group(param, self._pop(param))
        if param in self._ahead:
            entries = entries + self._ahead.pop(param)
        self.entries[param] = entries

    @property
    def _room(self) -> int:
        """What a reduction may take beside the gradients that wait: a quarter of the budget, unless memory ran out."""
        return max(self.budget // 2, self.budget - self.waiting)

    def _product(self, parts: Sequence[MaterializedRows]) -> Product:
        grads = parts[0].grads
        return Product(
            rows=self.wanted.rows,
            lengths=(1,) * self.wanted.largest,
            out=grads[0].numel(),
            dtypes=(grads.dtype, grads.dtype),
            device=grads.device.type,
            is_materialized=True,
            is_weighted=self.is_weighted,
            directions=self.wanted.directions,
            waiting=self.waiting,
        )

    def _flush(self) -> None:
        """Reduce the small parameters that wait."""
        self.entries.update(self._patiently(self._queue.reduce, self.metric))
        self._queue.clear()

    def _single_slot(self, param: int) -> list[MaterializedRows] | None:
        """What was materialized of a parameter's rows, where that is all there is, and of one slot; else None."""
        parts = self._materialized.get(param)
        if not parts or self._forms.get(param) or any(part.slot != parts[0].slot for part in parts):
            return None
        return parts

    def _all_rows(self, param: int, parts: Sequence[MaterializedRows]) -> Tensor | None:
        """Entries of a parameter of which gradients of one slot are all there is; None where memory ran out."""
        root, directions = self.metric(param, parts[0].slot)
        if root is not None and directions is not None:
            directions = directions * root
        try:
            entries = reduce_tiles(row_gradients(parts, self.wanted.rows, root), self.wanted, directions)
        except torch.OutOfMemoryError:
            return None
        del self._materialized[param]
        return entries

    def _refuse_late(self, param: int) -> None:
        """Only lookups can be added to what `shrink` reduced ahead: products with other formats would be missing."""
        if param in self._ahead:
            raise AssertionError(f"parameter {param} is used again after its head was reduced for the lookups to come")

    def _pop(self, param: int) -> dict[int, dict[Slot, list[Form]]]:
        """Everything that is held of a parameter, row by row, and held here no more."""
        held = self._forms.pop(param, {})
        for part in self._materialized.pop(param, []):
            for row, grad in zip(part.rows, part.grads, strict=True):
                held.setdefault(row, {}).setdefault(part.slot, []).append(Materialized(grad))
        return held

    def _group_by_group(self, param: int, held: dict[int, dict[Slot, list[Form]]]) -> Tensor:
        totals: list[Tensor | None] = []
        for group in self.wanted.groups:
            rows = [held.get(row, {}) for row in group]
            slots = sorted({slot for row in rows for slot in row})
            sums = [self._patiently(self._slot, param, slot, [row.get(slot, []) for row in rows]) for slot in slots]
            totals.append(torch.stack(sums).sum(0) if sums else None)
        return self._joined(totals)

    def _joined(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Entries `[M]` from those of each group `[m]`, zero for None."""
        device = next((part.device for part in parts if part is not None), torch.device("cpu"))
        zeros = torch.zeros(max(map(self.wanted.count, self.wanted.groups)), dtype=torch.float64, device=device)
        couples = zip(parts, self.wanted.groups, strict=True)
        return torch.cat([zeros[: self.wanted.count(group)] if part is None else part for part, group in couples])

    def _slot(self, param: int, slot: Slot, rows: Sequence[Sequence[Form]]) -> Tensor:
        """Entries `[m]` of one group and slot."""
        root, directions = self.metric(param, slot)
        return reduce_forms(rows, budget=self._room, root=root, directions=directions)

    def shrink(self, param: int, lookups: Callable[[int], Tensor]) -> None:
        """Reduce a tied weight's factored gradients now, and keep only the rows of them that its lookups will touch.

        With E the lookups' gradient and H the head's, `⟨E+H, E'+H'⟩ = ⟨H, H'⟩ + (⟨E+R, E'+R'⟩ − ⟨R, R'⟩)`, R being H on
        the rows that a lookup of the group touches: the head's `[T, V]` output gradients need not be held until the
        embedding's arrive. `lookups` gives the ids int64 `[T]` that a row's lookups, still to come, will touch.
        """
        held = [
            (slot, form) for row in self._forms.get(param, {}).values() for slot, forms in row.items() for form in forms
        ]
        if self._materialized.get(param) or any(slot or isinstance(form, Materialized) for slot, form in held):
            return  # used loosely as well, or in parts: everything waits for the last use
        rows_held = self._forms.pop(param, {})
        ahead: list[Tensor | None] = []
        for group in self.wanted.groups:
            sides = [merge_forms(rows_held.get(row, {}).get((), [])) for row in group]
            heads = [[form for form in side if isinstance(form, Factored)] for side in sides]
            for row, side in zip(group, sides, strict=True):
                for form in side:
                    if isinstance(form, SparseRows):
                        self.add(param, row, (), form)
            if not any(heads):
                ahead.append(None)
                continue
            seen = [form.ids for side in sides for form in side if isinstance(form, SparseRows)]
            ids = torch.unique(torch.cat([*map(lookups, group), *seen]))
            kept: list[list[Form]] = [[self._patiently(self._kept, head, ids) for head in side] for side in heads]
            touched = self._patiently(self._taken_back, param, kept)
            ahead.append(self._patiently(self._slot, param, (), heads) - touched)
            for row, parts in zip(group, kept, strict=True):
                for part in parts:
                    self.add(param, row, (), part)
        self._ahead[param] = self._joined(ahead)

    def _taken_back(self, param: int, rows: Sequence[Sequence[Form]]) -> Tensor:
        """Entries `[m]` that are subtracted, of rows that come again with a parameter's last uses."""
        return self._slot(param, (), rows)

    def _kept(self, head: Factored, ids: Tensor) -> SparseRows:
        """What a head's gradient has on some rows of the weight."""
        return SparseRows(ids, gathered(head, ids, self._room))

    def close(self) -> None:
        """Reduce what is still open: uses that the backward pass never reached have a zero gradient."""
        for param in [number for number in {**self._forms, **self._materialized} if number not in self.entries]:
            self.finish(param)
        self._flush()

    def clear(self) -> None:
        """Let go of every format; entries stay."""
        self._forms.clear()
        self._materialized.clear()
        self._ahead.clear()
        self._queue.clear()

    def _patiently(self, reduce: Callable[..., T], *operands: Any) -> T:
        """A reduction; where memory runs out, it and what follows go on in tiles of half the size."""
        for _ in range(RETRIES):
            try:
                return reduce(*operands)
            except torch.OutOfMemoryError:
                self.budget = max(1024, self.budget // 2)
            # Outside of the handler, which holds the failed attempt's tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return reduce(*operands)
