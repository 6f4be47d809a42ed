"""Products of the rows of a backward as an optimizer's step weighs them, tile by tile.

A tile holds every row's gradient of some elements of a parameter, so that what the step makes of these elements can be
worked out on the spot: nothing of a parameter's size is made beside the optimizer's own state.

P is the preconditioner as it is before the step. An element whose second moment this step lets grow more than `GROWTH`
times over (a rare token's embedding, that had no gradient until now) has no such P: before the step it is 1/ε, a
hundred million, and after it what the step's own gradient makes it. Adam moves it by `lr · limit · sign(grad)`, however
large the gradient, and row j's part of that is `h_j / |grad|`. These elements have products of their own.

Letters: N rows, W directions that P multiplies, E that it does not, M entries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradent.kernels.common.numerics import RUN, dots, reduce_stacked, spans
from gradent.kernels.common.precision import exact_products
from gradent.kernels.common.wanted import Wanted

__all__ = ["AccountLayout", "AccountSums", "ElementMetric", "KeptEstimate", "RowSums"]

BLOCK = 2**23
"""Numbers of a tile that a CPU works on at once: less, and calls cost more than what they do."""

ENOUGH = 2**22
"""Elements that tell which part of a gradient is kept."""

GROWTH = 10.0
"""By how much `√v̂ + ε` must grow in a step for the element to have had no preconditioner before it."""


@dataclass(frozen=True)
class AccountLayout:
    """Where everything lies among a parameter's entries, one flat float64 vector `[M]`."""

    rows: int
    weighted: int  # W
    plain: int  # E
    bare: Wanted = field(default_factory=lambda: Wanted.pairs(0))  # of the first rows, without a metric

    @property
    def beside(self) -> int:
        """Tensors of a row's size that are made beside a tile: directions, its sum over rows, its denominators."""
        return self.weighted + self.plain + 2

    @cached_property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each block, in order."""
        rows = self.rows
        return {
            "products": (rows, rows), "along": (self.weighted, rows), "plain": (self.plain, rows),
            "fresh": (rows + 1, rows), "bare": (self.bare.count_all,),
        }  # fmt: skip

    @cached_property
    def count(self) -> int:
        """M."""
        return sum(torch.Size(shape).numel() for shape in self.blocks.values())

    def split(self, entries: Tensor) -> dict[str, Tensor]:
        """Name -> block, of the block's shape."""
        sizes = [torch.Size(shape).numel() for shape in self.blocks.values()]
        parts = zip(self.blocks.items(), torch.split(entries, sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def scaled(self, entries: Tensor, factors: Tensor) -> dict[str, Tensor]:
        """`split` of rows that are multiplied by `factors` `[N]` float64."""
        parts, both = self.split(entries), factors[:, None] * factors
        ends = torch.cat([factors, factors.new_ones(1)])[:, None]
        scales = {"products": both, "along": factors, "plain": factors, "fresh": ends * factors}
        bare = self.bare.scaled(parts.pop("bare"), factors[: self.bare.rows])
        return {name: part * scales[name] for name, part in parts.items()} | {"bare": bare}


class KeptEstimate:
    """About which part of a backward's gradient reaches the optimizer, seen from v, an average of what did."""

    def __init__(self, known: float | None = None) -> None:
        self._known = known
        self._sums: dict[torch.device, Tensor] = {}
        self._seen: dict[torch.device, int] = defaultdict(int)
        self._found: dict[torch.device, Tensor | float] = {}

    def update(self, second: Tensor, squares: Tensor, correction: float) -> Tensor | float:
        """The square of the estimate, a scalar, with `v = correction · v̂` and `grad²` of one more tile."""
        if self._known is not None:
            return self._known**2
        device = second.device
        if device in self._found:
            return self._found[device]
        sums = self._sums.setdefault(device, torch.zeros(2, dtype=torch.float64, device=device))
        self._seen[device] += second.numel()
        sums += torch.stack([second.sum() / correction, squares.sum()])
        part = (sums[0] / sums[1].clamp_min(1e-300)).clamp_max(1.0)
        estimate = torch.where(sums[0] > 0, part, 1.0)  # nothing is known where all elements are new
        if self._seen[device] >= ENOUGH:
            self._found[device] = float(estimate) if device.type == "cpu" else estimate
        return estimate


@dataclass(frozen=True, kw_only=True)
class ElementMetric:
    """What an optimizer has of one parameter (or of a slot of it), each tensor of its shape."""

    second: Tensor | None = None  # v, or the largest of amsgrad; None where P = 1
    correction: float = 1.0  # `1 − β₂ᵗ` of the steps so far
    eps: float = 0.0
    growth: float = 0.0  # `√((1 − β₂) / (1 − β₂ᵗ⁺¹))`: what a gradient adds to `√v̂` by itself
    before: Tensor | None = None  # the gradient that was there before this backward
    weighted: Sequence[Tensor | None] = ()  # W directions; None for zero
    plain: Sequence[Tensor | None] = ()  # E directions

    @classmethod
    def join(cls, parts: Sequence[ElementMetric]) -> ElementMetric:
        """Several parameters' of equal numbers, one behind the other: tensors of `[n]`."""
        first = parts[0]

        def flat(tensors: Sequence[Tensor | None]) -> Tensor | None:
            found = [tensor.reshape(-1) for tensor in tensors if tensor is not None]
            return torch.cat(found) if found else None

        return cls(
            second=flat([part.second for part in parts]), correction=first.correction, eps=first.eps,
            growth=first.growth, before=flat([part.before for part in parts]),
            weighted=[flat(column) for column in zip(*(part.weighted for part in parts), strict=True)],
            plain=[flat(column) for column in zip(*(part.plain for part in parts), strict=True)],
        )  # fmt: skip

    def at(self, place: Any) -> ElementMetric:
        """The same of a part of the parameter."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[place]

        return ElementMetric(
            second=cut(self.second), correction=self.correction, eps=self.eps, growth=self.growth,
            before=cut(self.before), weighted=[*map(cut, self.weighted)], plain=[*map(cut, self.plain)],
        )  # fmt: skip

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> ElementMetric:
        """The same in another shape of the parameter."""

        def turn(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return ElementMetric(
            second=turn(self.second), correction=self.correction, eps=self.eps, growth=self.growth,
            before=turn(self.before), weighted=[*map(turn, self.weighted)], plain=[*map(turn, self.plain)],
        )  # fmt: skip


class AccountSums:
    """Entries of one parameter, summed up over its tiles."""

    def __init__(self, layout: AccountLayout, metric: ElementMetric, shares: Tensor, kept: KeptEstimate) -> None:
        """`shares` `[N]` times the rows of a tile are the rows' parts of the loss's gradient."""
        self._layout, self._metric, self._shares, self._kept = layout, metric, shares, kept
        self._sums: dict[str, Tensor] = {}

    def of(self, metric: ElementMetric) -> AccountSums:
        """The same sums, to which elements with another metric are added."""
        self._metric = metric
        return self

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> AccountSums:
        """The same sums, of a parameter in another shape."""
        self._metric = self._metric.reshaped(change)
        return self

    @property
    def beside(self) -> int:
        """Tensors of a row's size that are made beside a tile."""
        return self._layout.beside

    def _prepare(self, device: torch.device) -> None:
        if not self._sums:
            self._sums = {
                name: torch.zeros(shape, dtype=torch.float64, device=device)
                for name, shape in self._layout.blocks.items()
            }

    @property
    def entries(self) -> Tensor:
        """`[M]`."""
        return torch.cat([part.flatten() for part in self._sums.values()])

    def add(self, tile: Tensor, place: Any) -> None:
        """Add a contiguous tile `[N, ...]` of the elements `place`, wide; it is written to."""
        self._prepare(tile.device)
        flat = tile.view(len(tile), -1)
        metric = self._metric.at(place).reshaped(lambda tensor: tensor.reshape(-1))
        step = max(RUN, BLOCK // len(tile) // RUN * RUN) if tile.device.type == "cpu" else flat.shape[1]
        with exact_products(tile.device):
            for span in spans(flat.shape[1], max(1, step)):
                self._add(flat[:, span], metric.at(span))
            self._take_weighed(tile, place)

    def _take_weighed(self, rows: Tensor, place: Any) -> None:
        """Make something of the rows of a tile once `√P` has been multiplied in, but for the correction of v."""

    def _add(self, flat: Tensor, metric: ElementMetric) -> None:
        self._add_bare(flat)
        for place, direction in enumerate(metric.plain):
            if direction is not None:
                self._sums["plain"][place] += dots(direction.to(flat.dtype)[None], flat)[0]
        root = None if metric.second is None else self._weigh(flat, metric)
        scale = metric.correction**0.5
        self._sums["products"] += dots(flat, flat) * scale
        for place, direction in enumerate(metric.weighted):
            if direction is not None:
                along = direction.to(flat.dtype) if root is None else direction * root
                self._sums["along"][place] += dots(along[None], flat)[0] * scale

    def _add_bare(self, flat: Tensor) -> None:
        bare = self._layout.bare
        if bare.rows:
            self._sums["bare"] += reduce_stacked(flat[: bare.rows, None], bare)[0]

    def _weigh(self, flat: Tensor, metric: ElementMetric) -> Tensor:
        """Multiply the rows by `√P`, which is returned, 0 where an element has none; add up the products there."""
        assert metric.second is not None
        second = metric.second.to(flat.dtype)
        grad = self._shares.to(flat) @ flat
        if metric.before is not None:
            grad += metric.before
        squares = grad.square()
        kept = self._kept.update(second, squares, metric.correction)
        reach = metric.correction * (metric.growth / GROWTH) ** 2 * kept  # v grows `GROWTH` times over where it is less
        least = -metric.correction * metric.eps**2
        lack = second - squares.mul_(reach)
        root = second.sqrt().add_(metric.eps * metric.correction**0.5).rsqrt_()
        if flat.device.type != "cpu" or float(lack.amin()) < least:
            self._add_fresh(flat, lack < least, grad.abs_(), root, metric.before)
        flat *= root
        return root

    def _add_fresh(self, flat: Tensor, fresh: Tensor, size: Tensor, root: Tensor, before: Tensor | None) -> None:
        """Take fresh elements, of which there are few, out of the root: the gradient's own size weighs them."""
        rows, places = len(flat), fresh.nonzero()[:, 0]
        root.masked_fill_(fresh, 0.0)
        own = size[places].rsqrt_()
        scaled = flat[:, places] * own
        self._sums["fresh"][:rows] += dots(scaled, scaled)
        if before is not None:
            self._sums["fresh"][rows] += dots((before[places].to(own.dtype) * own)[None], scaled)[0]


class RowSums(AccountSums):
    """Keeps the rows' gradients, `[N, *shape]`, instead of summing up what a step makes of them."""

    def __init__(self, layout: AccountLayout, kept: Tensor) -> None:
        super().__init__(layout, ElementMetric(), torch.zeros(0), KeptEstimate())
        self._rows = kept

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> AccountSums:
        """The same, of a parameter as a matrix."""
        self._rows = self._rows[:, None] if self._rows.dim() < 3 else self._rows.flatten(2)
        return self

    def add(self, tile: Tensor, place: Any) -> None:
        """Keep a tile `[N, ...]` of the elements `place`, in place of what was kept of them."""
        self._prepare(tile.device)
        with exact_products(tile.device):
            self._add_bare(tile.flatten(1))
        self._rows[place if place is ... else (slice(None), *place)] = tile
