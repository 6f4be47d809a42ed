"""The table of reducers: what each strategy of `decide` does with what arrives.

Letters: N rows of the micro-batch, R rows of one forward, T tokens, O and I the two sides of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.reduction.weight_grad_reuse import give
from gradent.hooks.uses.formats import scaled, scaled_rows
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.uses import MatrixUse, Use
from gradent.kernels.common.numerics import row_products
from gradent.kernels.strategy import Reducer, Strategy
from gradent.kernels.with_weight_grad import reduce_with_sum

__all__ = ["REDUCERS", "Arrival", "Place", "add_gradients", "keep_formats"]


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
