"""Which rows stand for a data set: one of each of so many slices of like length."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["draw_in_slices"]


def draw_in_slices(sizes: Sequence[int], count: int | None, seed: int) -> list[list[int]]:
    """Cut items, sorted by size, into slices of equal count, and shuffle each: its first item is the one drawn."""
    # Stratified sampling, one draw a stratum: long and short items are there in their true proportions, in every
    # sample. The items after the first stand in for it, where it proves to be of no use.
    if count is None or count >= len(sizes):
        return [[position] for position in range(len(sizes))]
    order = sorted(range(len(sizes)), key=lambda position: (sizes[position], position))
    chance = random.Random(seed)
    slices = [order[part * len(order) // count : (part + 1) * len(order) // count] for part in range(count)]
    for each in slices:
        chance.shuffle(each)
    return slices
