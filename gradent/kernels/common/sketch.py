"""One vector for each row's gradient over all parameters: the gradient itself where it fits, else a CountSketch of it.

Inner products of two rows' vectors are those of their gradients, exactly or without bias. Bucket and sign of an
element follow from its place alone, so that sketches of different backwards, devices and ranks belong together. Of a
sketch of K buckets, an inner product's standard error is about `√((‖g_i‖²‖g_j‖² + ⟨g_i, g_j⟩²) / K)`.

Source: Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams" (2002).

Letters: N rows, K numbers of a vector, n elements of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradent.kernels.common.account import AccountLayout, AccountSums, ElementMetric, KeptEstimate
from gradent.kernels.common.numerics import spans

__all__ = ["PLACES", "GradientSketch", "RowSketches", "SketchSums", "WeighedSketchSums", "folded"]

_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Odd numbers of splitmix64, as signed ones."""


AT_ONCE = 2**15
"""Elements that a CPU hashes at once: what is made of them stays in its caches."""


class GradientSketch:
    """Where the elements of parameters of these shapes lie in vectors of at most `width` numbers.

    Vectors of one `seed` belong together; errors of different seeds are independent.
    """

    def __init__(self, shapes: Sequence[torch.Size], width: int, *, seed: int = 0) -> None:
        sizes = [shape.numel() for shape in shapes]
        self._shapes = list(shapes)
        self._shift = 1 + (seed % 2**20 << 42)  # beyond the places of any gradient
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.is_exact = width >= sum(sizes)
        """Whether a vector is the gradient itself."""
        self.width = min(width, sum(sizes))
        """K."""

    def view(self, number: int, slot: Any) -> Tensor:
        """A slot of a parameter that has places and no values."""
        return torch.empty(self._shapes[number], device="meta")[tuple(slot)]

    def places(self, number: int, view: Tensor, place: Any, device: torch.device) -> Tensor:
        """int64 `[n]`: the places of a tile's elements in the gradient of all parameters, for a tile `view[place]`."""
        chosen = [place] if not isinstance(place, tuple) else list(place)
        if chosen == [...]:
            chosen = []
        chosen += [slice(None)] * (view.dim() - len(chosen))
        index = torch.full((1,) * view.dim(), self._starts[number] + int(view.storage_offset()), device=device)
        for axis, (some, size, stride) in enumerate(zip(chosen, view.shape, view.stride(), strict=True)):
            along = torch.arange(size, device=device)[some] * stride
            index = index + along.view([-1 if other == axis else 1 for other in range(view.dim())])
        return index.flatten()

    def hashed(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket int64 and sign int8 of elements, `[n]` each."""
        mixed = (places + self._shift).mul_(_MIX[0])
        for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
            mixed.bitwise_xor_(_shifted(mixed, shift)).mul_(factor)
        mixed.bitwise_xor_(_shifted(mixed, 31))
        signs = (mixed & 1).to(torch.int8).mul_(2).sub_(1)
        buckets = _shifted(mixed, 2)
        # For a power of two, the same by a mask, which takes a tenth of the time.
        is_power = self.width & (self.width - 1) == 0
        return buckets.bitwise_and_(self.width - 1) if is_power else buckets.remainder_(self.width), signs

    def add(self, vectors: Tensor, places: Tensor, rows: Tensor, factor: float = 1.0, *, room: int = 2**24) -> None:
        """Add `factor` times the elements `places` of rows, `[N, n]`, to sketches `[N, K]`, in `room` bytes."""
        step = max(1024, min(AT_ONCE if rows.device.type == "cpu" else room, room // (64 + 8 * len(rows))))
        for span in spans(rows.shape[1], step):
            buckets, signs = self.hashed(places[span])
            values = rows[:, span] * signs.to(rows.dtype).mul_(factor)
            vectors.index_add_(1, buckets, values.to(vectors.dtype))  # its `alpha` takes ten times as long


def _shifted(values: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings zeros in."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def folded(vectors: Tensor, width: int) -> Tensor:
    """Sketches `[N, width]` from those `[N, K]` of the same rows, K and width powers of two."""
    return vectors.view(len(vectors), -1, width).sum(1)


class SketchSums(AccountSums):
    """Adds one parameter's gradients to the vectors `[N, K]` of all rows; its own entries are zero."""

    def __init__(
        self, layout: AccountLayout, sketch: GradientSketch, vectors: Tensor, number: int, slot: Any, sign: float = 1.0
    ) -> None:
        super().__init__(layout, ElementMetric(), torch.zeros(0), KeptEstimate())
        self._sketch, self._vectors, self._number, self._sign = sketch, vectors, number, sign
        self._view = sketch.view(number, slot)
        self._pending: Tensor | None = None

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> AccountSums:
        """The same, of a parameter in another shape."""
        self._view = change(self._view)
        return self

    def add(self, tile: Tensor, place: Any) -> None:
        """Add a tile `[N, ...]` of the elements `place`."""
        places = self._sketch.places(self._number, self._view, place, tile.device)
        flat = tile.reshape(len(tile), -1)
        if self._sketch.is_exact:  # not added, so that a tile may come again after memory ran out
            self._vectors[:, places] = flat.to(self._vectors.dtype)
            return
        if self._pending is None:
            self._pending = torch.zeros_like(self._vectors)
        self._sketch.add(self._pending, places, flat, self._sign)

    @property
    def entries(self) -> Tensor:
        """Zeros `[M]`; the parameter is complete with them, and its vectors are added."""
        if self._pending is not None:
            self._vectors += self._pending
            self._pending = None
        return torch.zeros(self._layout.count, dtype=torch.float64, device=self._vectors.device)


class RowSketches:
    """Sketches of a backward's rows in an optimizer's metric, `√(r P) ∘ g`, with a rate r for each parameter."""

    def __init__(self, sketch: GradientSketch, rows: int, rates: Sequence[float], *, room: int) -> None:
        self.sketch, self.rates, self.room = sketch, rates, room
        self._rows = rows
        self._vectors: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """What is there of parameters on a device, float32 `[N, K]`, to be added to."""
        if device not in self._vectors:
            self._vectors[device] = torch.zeros(self._rows, self.sketch.width, device=device)
        return self._vectors[device]

    def total(self) -> Tensor:
        """float32 `[N, K]` on the CPU."""
        return sum((part.cpu() for part in self._vectors.values()), torch.zeros(self._rows, self.sketch.width))


PLACES = 2
"""Tensors of a row's size that the places of a tile's elements take."""


class WeighedSketchSums(AccountSums):
    """Adds one parameter's weighed gradients to the sketches of all rows, beside its entries."""

    def __init__(
        self, layout: AccountLayout, metric: ElementMetric, shares: Tensor, kept: KeptEstimate, *,
        sketches: RowSketches, number: int, slot: Any, sign: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(layout, metric, shares, kept)
        self._sketches, self._number = sketches, number
        self._view = sketches.sketch.view(number, slot)
        self._factor = sign * sketches.rates[number] ** 0.5 * metric.correction**0.25
        # What is not added yet, so that a parameter may come again after memory ran out: places and rows of a small
        # one, a large one's own sketches.
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._pending: Tensor | None = None

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> AccountSums:
        """The same sums, of a parameter in another shape."""
        self._view = change(self._view)
        return super().reshaped(change)

    @property
    def beside(self) -> int:
        """As without sketches, and the places of a tile's elements."""
        return super().beside + PLACES

    def _take_weighed(self, rows: Tensor, place: Any) -> None:
        if not self._factor:
            return
        sketches = self._sketches
        places = sketches.sketch.places(self._number, self._view, place, rows.device)
        if self._view.numel() <= sketches.sketch.width // 2:
            self._parts.append((places, rows.flatten(1).clone()))
            return
        if self._pending is None:
            self._pending = torch.zeros_like(sketches.on(rows.device))
        sketches.sketch.add(self._pending, places, rows.flatten(1), self._factor, room=sketches.room)

    @property
    def entries(self) -> Tensor:
        """`[M]`; the parameter is complete with them, and its part of the sketches is added."""
        entries = super().entries
        for places, rows in self._parts:
            vectors = self._sketches.on(rows.device)
            self._sketches.sketch.add(vectors, places, rows, self._factor, room=self._sketches.room)
        self._parts.clear()
        if self._pending is not None:
            vectors = self._sketches.on(self._pending.device)
            vectors += self._pending
            self._pending = None
        return entries
