"""From output gradients to entries: one decision for each that arrives, and a reduction once a parameter's last is in.

Letters: N rows of the micro-batch, R rows of one forward, T tokens, O and I the two sides of a weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradent.hooks.capture.capture import Tap
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.reduction.weight_grad_reuse import give, takes_gradient
from gradent.hooks.uses.folded import FoldedUse
from gradent.hooks.uses.formats import bytes_scaled, scaled, scaled_gradients, scaled_rows
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.uses import LookupUse, MatrixUse, SumUse, Use
from gradent.kernels.availability import on_kernels
from gradent.kernels.common.numerics import row_products
from gradent.kernels.common.precision import exact_products
from gradent.kernels.dispatch import is_even
from gradent.kernels.strategy import Product, Reducer, Strategy, decide
from gradent.kernels.with_weight_grad import reduce_with_sum

__all__ = ["REDUCERS", "Arrival", "Collector", "Place"]


@dataclass(frozen=True)
class Place:
    """Where the rows of one forward belong: its layout, and each of its R rows' number among the N (-1: nowhere)."""

    layout: Layout
    rows: Sequence[int]


@dataclass(frozen=True)
class Arrival:
    """What arrived at a use of a parameter."""

    use: Use
    grad_output: Tensor  # at the use's output
    place: Place  # the rows of its forward
    factors: Sequence[float] | None = None  # powers of two, one a row of the forward, 0 to leave it out; None for 1
    node: Any = None  # of the graph, for what hands a weight gradient back

    @cached_property
    def product(self) -> tuple[Tensor, Tensor]:
        """Factors of every row's gradient, u `[R, T, O]` and v `[R, T, I]`."""
        assert isinstance(self.use, MatrixUse)
        return self.use.factors(self.grad_output, self.place.layout)

    @property
    def ends(self) -> list[int] | None:
        """Tokens of each row beyond which u or v is zero; None where that is not known."""
        layout = self.place.layout
        return layout.ends if self.product[0].shape[1] == layout.length else None

    def scaled_product(self) -> tuple[Tensor, Tensor]:
        """`product` of rows that are multiplied by their factors."""
        return self.product if self.factors is None else scaled_rows(*self.product, self.factors)


def _at_once(ledger: Ledger, arrival: Arrival, strategy: Strategy) -> bool:
    """Reduce a parameter of which this is all there is; False where memory ran out or a kernel failed."""
    param = arrival.use.view.param
    lengths = arrival.ends if strategy.backend == "triton" else None
    try:
        u, v = arrival.scaled_product()
        entries = ledger.reduce_factored(param, u, v, strategy, lengths)
    except torch.OutOfMemoryError:
        entries = None
    if entries is None:
        return keep_formats(ledger, arrival, strategy)
    ledger.entries[param] = entries
    return True


def _materialize(ledger: Ledger, arrival: Arrival, strategy: Strategy) -> bool:
    """Form every row's gradient, to be added to what the parameter has."""
    add_gradients(ledger, arrival, row_products(*arrival.scaled_product()))
    return False


def keep_formats(ledger: Ledger, arrival: Arrival, strategy: Strategy | None = None) -> bool:
    """Hold every row's gradient in the format in which it comes, until the parameter is complete."""
    use, place, factors = arrival.use, arrival.place, arrival.factors
    for index, slot, form in use.forms(arrival.grad_output, place.layout, ledger.budget):
        row, factor = place.rows[index], 1.0 if factors is None else factors[index]
        if row >= 0 and factor:
            ledger.add(use.view.param, row, slot, form if factors is None else scaled(form, factor))
    return False


def _reuse(ledger: Ledger, arrival: Arrival, strategy: Strategy) -> bool:
    """Reduce a parameter whose only use this is, and hand the sum of its rows' gradients to the trainer's backward."""
    param, (u, v), layout = arrival.use.view.param, arrival.product, arrival.place.layout
    assert arrival.factors is not None
    # The sum goes to the trainer, so that nothing may be left out which is not seen to be zero by now.
    look = layout.look if layout.certain and u.shape[1] == layout.length else None
    ledger.entries[param], total = reduce_with_sum(
        u,
        v,
        arrival.place.rows,
        arrival.factors,
        wanted=ledger.wanted,
        budget=strategy.scratch,
        weight=ledger.metric(param, ())[0],
        look=look,
    )
    give(arrival.node, arrival.grad_output, total)
    ledger.reused += 1
    return True


REDUCERS: dict[Reducer, Callable[[Ledger, Arrival, Strategy], bool]] = {
    "gram": _at_once,
    "outer": _at_once,
    "materialize": _materialize,
    "queue": _materialize,
    "group_by_group": keep_formats,
    "weight_grad_reuse": _reuse,
}
"""What each strategy does with an arrival; True where the parameter's entries are there, False where they wait."""


def add_gradients(ledger: Ledger, arrival: Arrival, grads: Tensor) -> None:
    """Add the gradients `[R, *slot]` of an arrival's rows, but those that belong nowhere or have no factor."""
    place, factors = arrival.place, arrival.factors
    kept = [index for index, row in enumerate(place.rows) if row >= 0 and (factors is None or factors[index])]
    rows = [place.rows[index] for index in kept]
    use = arrival.use
    ledger.add_rows(use.view.param, rows, use.view.slot, grads if len(kept) == len(grads) else grads[kept])


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
        use, param = tap.use, tap.use.view.param
        if param in self.ignored:
            return
        with torch.no_grad(), exact_products(grad_output.device):
            arrival = Arrival(use, grad_output, place, factors, tap.node)
            waiting, is_reduced = self._waiting[param], False
            waiting.pop(tap, None)
            if isinstance(use, (SumUse, FoldedUse)) and use.view.ids is None:
                grads = use.gradients(grad_output, place.layout, self._budget)
                add_gradients(self.ledger, arrival, grads if factors is None else scaled_gradients(grads, factors))
            elif isinstance(use, MatrixUse) and all(isinstance(other.use, MatrixUse) for other in waiting):
                strategy = decide(self._product(arrival, is_last=not waiting), self.ledger.budget)
                is_reduced = REDUCERS[strategy.reducer](self.ledger, arrival, strategy)
            else:
                keep_formats(self.ledger, arrival)
            if not waiting and not is_reduced:
                self.ledger.finish(param)
            elif waiting and not isinstance(use, LookupUse) and all(isinstance(one.use, LookupUse) for one in waiting):
                self.ledger.shrink(param, lambda row: self._lookups(param, row))
        tap.use = use.without_activations  # the graph lets go of its activations as the backward passes them

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
