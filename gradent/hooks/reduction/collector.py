"""From cotangents to entries: hands what arrives to the ledger, and has a parameter reduced once its last use is in.

Letters: k pairs, rows 0..k-1 chosen and k..2k-1 rejected; R rows of one forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.hooks.capture.capture import Tap
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.reduction.weight_grad_reuse import give, is_shared
from gradent.hooks.uses.formats import bytes_scaled, scaled, scaled_gradients, scaled_rows
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.uses import LookupUse, MatrixUse, SumUse, Use
from gradent.kernels.common.numerics import row_products
from gradent.kernels.common.precision import exact_products
from gradent.kernels.dispatch import on_kernels

__all__ = ["Collector", "Place"]


Product = tuple[Tensor, Tensor]
"""Factors of the gradients of one forward's rows, u `[R, T, O]` and v `[R, T, I]`."""


@dataclass(frozen=True)
class Place:
    """Where the rows of one forward belong: its layout, and each of its R rows' number among the 2k (-1: nowhere)."""

    layout: Layout
    rows: Sequence[int]


class Collector:
    """Uses that are waited for, by parameter.

    Args:
        ledger: takes the forms.
        budget: bytes that forming a product may take.

    Attributes:
        shared: parameters whose gradient was handed to the backward that brought the cotangents.
    """

    def __init__(self, ledger: Ledger, budget: int) -> None:
        self.ledger = ledger
        self._budget = budget
        self._waiting: dict[int, dict[Tap, Place]] = defaultdict(dict)
        self.shared = 0

    def expect(self, tap: Tap, place: Place) -> None:
        """Wait for a use's cotangent before its parameter is reduced.

        Args:
            tap: the recorded use.
            place: the rows of its forward.
        """
        self._waiting[tap.use.view.param][tap] = place

    def arrive(self, tap: Tap, cotangent: Tensor, place: Place, factors: Sequence[float] | None = None) -> None:
        """Take a use's cotangent.

        Args:
            tap: the recorded use.
            cotangent: the gradient at its output.
            place: the rows of its forward.
            factors: what each of the forward's rows is multiplied by, powers of two; a row of factor 0 is left out.
                None for 1.
        """
        with torch.no_grad(), exact_products(cotangent.device):
            self._take(tap, cotangent, place, factors)
        tap.use = tap.use.without_activations  # the graph lets go of its activations as the backward passes them

    def _take(self, tap: Tap, cotangent: Tensor, place: Place, factors: Sequence[float] | None) -> None:
        use, param = tap.use, tap.use.view.param
        waiting = self._waiting[param]
        waiting.pop(tap, None)
        product = self._product(use, cotangent, place)
        if (
            product is not None
            and not (waiting or use.view.slot)
            and (self._share(tap, cotangent, product, place, factors) or self._at_once(param, product, place, factors))
        ):
            return
        self._add(use, cotangent, self._formed(use, cotangent, product, place, factors), place, factors)
        if not waiting:
            self.ledger.finish(param)
        elif all(isinstance(other.use, LookupUse) for other in waiting) and not isinstance(use, LookupUse):
            self.ledger.shrink(param, lambda row: self._lookups(param, row))

    def _product(self, use: Use, cotangent: Tensor, place: Place) -> Product | None:
        """Factors of all rows' gradients, where products are all that is still to come of a parameter; else None."""
        others = self._waiting[use.view.param]
        if not isinstance(use, MatrixUse) or not all(isinstance(other.use, MatrixUse) for other in others):
            return None
        return use.factors(cotangent, place.layout)

    def _add(
        self, use: Use, cotangent: Tensor, grads: Tensor | None, place: Place, factors: Sequence[float] | None
    ) -> None:
        """Add every row's gradient: those of `_formed`, or forms."""
        param = use.view.param
        if grads is not None:
            kept = [index for index, row in enumerate(place.rows) if row >= 0 and (factors is None or factors[index])]
            rows = [place.rows[index] for index in kept]
            self.ledger.add_rows(param, rows, use.view.slot, grads if len(kept) == len(grads) else grads[kept])
            return
        for index, slot, form in use.forms(cotangent, place.layout, self._budget):
            row, factor = place.rows[index], 1.0 if factors is None else factors[index]
            if row >= 0 and factor:
                self.ledger.add(param, row, slot, form if factors is None else scaled(form, factor))

    def _formed(
        self, use: Use, cotangent: Tensor, product: Product | None, place: Place, factors: Sequence[float] | None
    ) -> Tensor | None:
        """The gradients of all rows `[R, ...]`, where these are the smaller thing to hold; None elsewhere."""
        if isinstance(use, SumUse) and use.view.ids is None:
            grads = use.gradients(cotangent, place.layout, self._budget)
            return grads if factors is None else scaled_gradients(grads, factors)
        if product is None or not self.ledger.folds(use.view.param, *product):
            return None
        return row_products(*(product if factors is None else scaled_rows(*product, factors)))

    def _share(
        self, tap: Tap, cotangent: Tensor, product: Product, place: Place, factors: Sequence[float] | None
    ) -> bool:
        """Reduce a parameter whose only use this is, and hand its gradient to that use; whether that was done."""
        if factors is None or not is_shared(tap.node):
            return False
        # The sum goes to the trainer, so that nothing may be left out which is not seen to be zero by now.
        certain = place.layout.certain and product[0].shape[1] == place.layout.length
        look = place.layout.look if certain else None
        grad = self.ledger.share(tap.use.view.param, *product, place.rows, factors, look)
        if grad is None:
            return False
        give(tap.node, cotangent, grad)
        self.shared += 1
        return True

    def _at_once(self, param: int, product: Product, place: Place, factors: Sequence[float] | None) -> bool:
        """Reduce a parameter of which one product is all there is, all rows together; whether that was done."""
        if not self.ledger.fills(place.rows) or self.ledger.gathers(*product):
            return False
        copied = 0 if factors is None else bytes_scaled(*product, factors)
        if factors is not None and copied:
            if not self.ledger.fits(*product, beside=copied):  # before anything is copied
                return False
            product = scaled_rows(*product, factors)
        u, v = product
        cut = u.shape[1] == place.layout.length and on_kernels(u)
        return self.ledger.whole(param, u, v, place.layout.ends if cut else None, beside=copied)

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
