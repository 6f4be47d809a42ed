"""From output gradients to entries: one decision for each that arrives, and a reduction once a parameter's last is in.

Letters: N rows of the micro-batch, R rows of one forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from gradent.hooks.capture.capture import Tap
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.reduction.reducers import REDUCERS, Arrival, Place, add_gradients, keep_formats
from gradent.hooks.reduction.weight_grad_reuse import takes_gradient
from gradent.hooks.uses.formats import bytes_scaled, scaled_gradients
from gradent.hooks.uses.uses import LookupUse, MatrixUse, SumUse
from gradent.kernels.availability import on_kernels
from gradent.kernels.common.precision import exact_products
from gradent.kernels.dispatch import is_even
from gradent.kernels.strategy import Product, decide

__all__ = ["Collector", "Place"]


class Collector:
    """Uses that are waited for, by parameter."""

    def __init__(self, ledger: Ledger, budget: int) -> None:
        self.ledger = ledger
        self.ignored: frozenset[int] = frozenset()
        """Parameters whose uses are not reduced: autograd forms their gradients."""
        self._budget = budget
        self._waiting: dict[int, dict[Tap, Place]] = defaultdict(dict)

    @property
    def shared(self) -> int:
        """Parameters whose gradient was handed to the backward that brought the output gradients."""
        return self.ledger.reused

    def expect(self, tap: Tap, place: Place) -> None:
        """Wait for a use's output gradient before its parameter is reduced."""
        self._waiting[tap.use.view.param][tap] = place

    def arrive(self, tap: Tap, grad_output: Tensor, place: Place, factors: Sequence[float] | None = None) -> None:
        """Take a use's output gradient, whose rows `factors` (powers of two, 0 to leave a row out) multiply."""
        if tap.use.view.param in self.ignored:
            return
        with torch.no_grad(), exact_products(grad_output.device):
            self._take(tap, Arrival(tap.use, grad_output, place, factors, tap.node))
        tap.use = tap.use.without_activations  # the graph lets go of its activations as the backward passes them

    def _take(self, tap: Tap, arrival: Arrival) -> None:
        use, param = arrival.use, arrival.use.view.param
        waiting = self._waiting[param]
        waiting.pop(tap, None)
        if isinstance(use, SumUse) and use.view.ids is None:
            grads = use.gradients(arrival.grad_output, arrival.place.layout, self._budget)
            add_gradients(
                self.ledger, arrival, grads if arrival.factors is None else scaled_gradients(grads, arrival.factors)
            )
        elif isinstance(use, MatrixUse) and all(isinstance(other.use, MatrixUse) for other in waiting):
            strategy = decide(self._product(arrival, is_last=not waiting), self.ledger.budget)
            if REDUCERS[strategy.reducer](self.ledger, arrival, strategy):
                return
        else:
            keep_formats(self.ledger, arrival)
        if not waiting:
            self.ledger.finish(param)
        elif all(isinstance(other.use, LookupUse) for other in waiting) and not isinstance(use, LookupUse):
            self.ledger.shrink(param, lambda row: self._lookups(param, row))

    def _product(self, arrival: Arrival, *, is_last: bool) -> Product:
        """What `decide` is asked about the rows of one forward."""
        (u, v), place, ledger = arrival.product, arrival.place, self.ledger
        param, wanted, factors = arrival.use.view.param, ledger.wanted, arrival.factors
        is_only = is_last and not arrival.use.view.slot and not ledger.holds(param)
        is_complete = is_only and list(place.rows) == list(range(wanted.rows))
        has_kernels = on_kernels(u, v) and is_even(u) and is_even(v)
        ends = arrival.ends if is_complete and has_kernels else None
        return Product(
            rows=wanted.rows,
            lengths=(u.shape[1] if ends is None else max(ends),) * wanted.largest,
            out=u.shape[2],
            inp=v.shape[2],
            dtypes=(u.dtype, v.dtype),
            device=u.device.type,
            has_kernels=has_kernels,
            is_complete=is_complete,
            has_factors=ledger.has_factors(param),
            can_reuse=is_only
            and factors is not None
            and arrival.node is not None
            and takes_gradient(arrival.node)
            and sum(row >= 0 for row in place.rows) == wanted.rows,
            is_weighted=ledger.is_weighted,
            directions=wanted.directions,
            waiting=ledger.waiting,
            copied=0 if factors is None else bytes_scaled(u, v, factors),
        )

    def _lookups(self, param: int, row: int) -> Tensor:
        """Ids, int64 `[T]`, that lookups still to come will touch in a row."""
        ids = []
        for tap, place in self._waiting[param].items():
            assert isinstance(tap.use, LookupUse)
            here = row in place.rows
            ids.append(tap.use.row_ids(place.rows.index(row), place.layout) if here else tap.use.ids.reshape(-1)[:0])
        return torch.cat(ids)

    @property
    def open(self) -> dict[int, int]:
        """Parameters whose uses have not all arrived, with how many are missing."""
        return {param: len(taps) for param, taps in self._waiting.items() if taps}

    def clear(self) -> None:
        """Let go of everything that is waited for, and of what waits to be reduced."""
        self._waiting.clear()
        self.ledger.clear()
