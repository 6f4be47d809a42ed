"""Which products of the rows of a backward are wanted, and where each of them lies among the entries.

Letters: N rows, n rows of one group, D directions, M entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Wanted", "pick"]


@dataclass(frozen=True)
class Wanted:
    """A partition of N rows into groups: the products among a group's rows, and of every row with D directions.

    Entries are one flat float64 vector, group after group: n squares, the n(n-1)/2 products of two rows, row by row,
    and each row's D products with directions. Of a pair these are `(‖G_w‖², ‖G_l‖², ⟨G_w, G_l⟩)`.
    """

    groups: tuple[tuple[int, ...], ...]
    directions: int = 0

    @classmethod
    def pairs(cls, count: int) -> Wanted:
        """k groups of two rows: chosen i and rejected k + i."""
        return cls.sizes([2] * count)

    @classmethod
    def sizes(cls, sizes: Sequence[int], directions: int = 0) -> Wanted:
        """Groups of these sizes: of equal ones row s of group g is row s·G + g, else they follow one another."""
        if len(set(sizes)) == 1:
            return cls(tuple(tuple(range(g, len(sizes) * sizes[0], len(sizes))) for g in range(len(sizes))), directions)
        starts = [sum(sizes[:g]) for g in range(len(sizes))]
        return cls(tuple(tuple(range(a, a + n)) for a, n in zip(starts, sizes, strict=True)), directions)

    @classmethod
    def all(cls, rows: int, directions: int = 0) -> Wanted:
        """One group of all rows."""
        return cls.sizes([rows], directions)

    @cached_property
    def rows(self) -> int:
        """N."""
        return sum(map(len, self.groups))

    @cached_property
    def largest(self) -> int:
        """Rows of the largest group."""
        return max(map(len, self.groups), default=0)

    @cached_property
    def is_even(self) -> bool:
        """Whether all groups have one size and lie as `sizes` lays them."""
        sizes = [len(group) for group in self.groups]
        return len(set(sizes)) == 1 and self.groups == Wanted.sizes(sizes).groups

    @cached_property
    def count_all(self) -> int:
        """M."""
        return sum(map(self.count, self.groups))

    def count(self, group: Sequence[int]) -> int:
        """Entries of a group, m."""
        return len(group) * (len(group) + 1) // 2 + len(group) * self.directions

    def joined(self, products: Tensor, along: Tensor) -> Tensor:
        """Entries `[M]` from the products among rows, group after group, and the products with directions `[N, D]`."""
        parts, start, rows = [], 0, along.unbind()
        for group in self.groups:
            stop = start + len(group) * (len(group) + 1) // 2
            parts += [products[start:stop], *(rows[row] for row in group)]
            start = stop
        return torch.cat(parts)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Of each entry its two rows, int64 `[M]` each; direction d counts as row N + d."""
        left: list[int] = []
        right: list[int] = []
        for group in self.groups:
            couples = [(row, row) for row in group]
            couples += [(row, other) for place, row in enumerate(group) for other in group[place + 1 :]]
            couples += [(row, self.rows + number) for row in group for number in range(self.directions)]
            left += [row for row, _ in couples]
            right += [other for _, other in couples]
        return torch.tensor(left, dtype=torch.int64), torch.tensor(right, dtype=torch.int64)

    def scaled(self, entries: Tensor, factors: Tensor) -> Tensor:
        """Entries `[M]` of rows that are multiplied by `factors` `[N]` float64, on the CPU."""
        padded = torch.cat([factors, factors.new_ones(self.directions)])
        left, right = self.places
        return entries * (padded[left] * padded[right]).to(entries.device)

    def matrix(self, entries: Tensor) -> Tensor:
        """Products of rows `[N, N]`, nan where they are not wanted, from entries `[M]` on the CPU."""
        products = torch.full((self.rows, self.rows), float("nan"), dtype=torch.float64)
        left, right = self.places
        inside = right < self.rows
        left, right = left[inside], right[inside]
        products[left, right] = products[right, left] = entries[inside]
        return products

    def along(self, entries: Tensor) -> Tensor:
        """Products of rows with directions `[N, D]`, from entries `[M]` on the CPU."""
        left, right = self.places
        outside = right >= self.rows
        products = torch.zeros(self.rows, self.directions, dtype=torch.float64)
        products[left[outside], right[outside] - self.rows] = entries[outside]
        return products


def pick(gram: Tensor, rows: int) -> Tensor:
    """A group's entries `[..., m]` from `[..., n + D, n]`, products of its rows and of D directions with its rows."""
    among = [gram[..., row, row + 1 : rows] for row in range(rows - 1)]
    parts = [gram[..., :rows, :].diagonal(dim1=-2, dim2=-1), *among, gram[..., rows:, :].mT.flatten(-2)]
    return torch.cat(parts if gram.shape[-2] > rows else parts[:-1], -1)
