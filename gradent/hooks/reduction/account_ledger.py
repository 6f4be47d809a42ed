"""A ledger of an optimizer's step: all rows' products as the step weighs them, beside those without a metric.

Letters: N rows of the running micro-batch, M entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.reduction.merge import account_forms
from gradent.hooks.reduction.small_gradients import MaterializedRows, Slot, row_gradients
from gradent.hooks.uses.formats import Form
from gradent.kernels.common.account import AccountLayout, AccountSums, ElementMetric, KeptEstimate, RowSums
from gradent.kernels.common.numerics import accumulator, row_products
from gradent.kernels.common.sketch import PLACES, GradientSketch, RowSketches, SketchSums, WeighedSketchSums
from gradent.kernels.common.wanted import Wanted
from gradent.kernels.outer.reference import account_all_rows
from gradent.kernels.strategy import Strategy

__all__ = ["AccountLedger", "RowLedger", "VectorLedger"]


class AccountLedger(Ledger):
    """Entries as an `AccountLayout` has them; `shares` `[N]` are filled in before a row's gradients come.

    With `sketches`, the rows' weighed gradients are added to these as well.
    """

    def __init__(
        self, layout: AccountLayout, metric: Callable[[int], ElementMetric], shares: Tensor, *, budget: int,
        sketches: RowSketches | None = None,
    ) -> None:  # fmt: skip
        beside = layout.beside + (0 if sketches is None else PLACES)
        super().__init__(Wanted.all(layout.rows, beside), budget=budget)
        self.layout, self.sketches = layout, sketches
        self._element_metric, self._shares, self._estimate = metric, shares, KeptEstimate()
        self._sign = 1.0  # of what is added to sketches

    @property
    def is_weighted(self) -> bool:
        """Yes: tiles of gradients are wanted."""
        return True

    @property
    def can_wait(self) -> bool:
        """No: what was accumulated before is one of the directions, and is gone soon."""
        return False

    def reduce_factored(
        self, param: int, u: Tensor, v: Tensor, strategy: Strategy, lengths: Sequence[int] | None
    ) -> Tensor | None:
        """Entries `[M]` of a parameter whose factors of all rows these are."""
        return account_all_rows(row_products(u, v), self._sums(param, ()))

    def _sums(self, param: int, slot: Slot) -> AccountSums:
        metric = self._element_metric(param)
        operands = self.layout, metric.at(slot) if slot else metric, self._shares, self._estimate
        if self.sketches is None:
            return AccountSums(*operands)
        return WeighedSketchSums(*operands, sketches=self.sketches, number=param, slot=slot, sign=self._sign)

    def _taken_back(self, param: int, rows: Sequence[Sequence[Form]]) -> Tensor:
        self._sign = -1.0
        try:
            return super()._taken_back(param, rows)
        finally:
            self._sign = 1.0

    def _all_rows(self, param: int, parts: Sequence[MaterializedRows]) -> Tensor | None:
        try:
            grads = row_gradients(parts, self.layout.rows, None).clone()  # the account writes to it
            entries = account_all_rows(grads, self._sums(param, parts[0].slot))
        except torch.OutOfMemoryError:
            return None
        del self._materialized[param]
        return entries

    def _slot(self, param: int, slot: Slot, rows: Sequence[Sequence[Form]]) -> Tensor:
        return account_forms(rows, self._sums(param, slot), budget=self._room)

    def _joined(self, parts: Sequence[Tensor | None]) -> Tensor:
        (part,) = parts
        return torch.zeros(self.layout.count, dtype=torch.float64) if part is None else part


class RowLedger(AccountLedger):
    """Keeps every row's gradient, until the whole step is known: for what is small enough."""

    def __init__(self, bare: Wanted, tensors: Sequence[Tensor], *, budget: int) -> None:
        layout = AccountLayout(bare.rows, 0, 0, bare)
        super().__init__(layout, lambda number: ElementMetric(), torch.zeros(layout.rows), budget=budget)
        self._tensors = tensors
        self.kept: dict[int, Tensor] = {}
        """Parameter number -> `[N, *shape]`, wide."""

    def _sums(self, param: int, slot: Slot) -> AccountSums:
        if param not in self.kept:
            tensor = self._tensors[param]
            shape = self.layout.rows, *tensor.shape
            self.kept[param] = torch.zeros(shape, dtype=accumulator(tensor.dtype), device=tensor.device)
        index: tuple[Any, ...] = (slice(None), *slot)
        return RowSums(self.layout, self.kept[param][index])

    def clear(self) -> None:
        """Let go of every format and row; entries stay."""
        super().clear()
        self.kept = {}


class VectorLedger(AccountLedger):
    """Makes one vector of each row's whole gradient, `[N, K]`: the only entries, once it is closed."""

    def __init__(
        self, rows: int, sketch: GradientSketch, *, dtype: torch.dtype, device: torch.device, budget: int
    ) -> None:
        super().__init__(AccountLayout(rows, 0, 0), lambda number: ElementMetric(), torch.zeros(rows), budget=budget)
        self._sketch = sketch
        self._vectors = torch.zeros(rows, sketch.width, dtype=dtype, device=device)

    def _sums(self, param: int, slot: Slot) -> AccountSums:
        return SketchSums(self.layout, self._sketch, self._vectors, param, slot, self._sign)

    def close(self) -> None:
        """Reduce what is still open; the entries are the vectors then."""
        super().close()
        self.entries = {0: self._vectors}
