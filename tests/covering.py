"""Cross products, of which each day runs a covering array: every pair of two factors' values occurs in some case."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import pytest

__all__ = ["covering_rows", "cross"]


def covering_rows(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of numbers below `sizes` in which every pair of two columns' numbers occurs; greedy, always the same."""
    product = list(itertools.product(*map(range, sizes)))
    columns = list(itertools.combinations(range(len(sizes)), 2))

    def pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(one, row[one], other, row[other]) for one, other in columns}

    missing = set().union(*map(pairs, product))
    rows = []
    while missing:
        row = max(product, key=lambda each: len(pairs(each) & missing))
        rows.append(row)
        missing -= pairs(row)
    return rows


def cross(names: str, *factors: Collection[Any], ids: Sequence[Sequence[str] | None] = ()) -> pytest.MarkDecorator:
    """`parametrize` with the product of some factors: a covering array by day, the other cases by night.

    Args:
        names: of the arguments, as `parametrize` takes them.
        factors: the values of each, three factors or more.
        ids: names of each factor's values; None, or left out, for what the values read as.

    Returns:
        The decorator.
    """
    values = [list(factor) for factor in factors]
    daily = set(covering_rows([len(factor) for factor in values]))
    labels = [
        named or [str(value) for value in factor]
        for factor, named in itertools.zip_longest(values, ids, fillvalue=None)
    ]
    cases = [
        pytest.param(
            *(factor[at] for factor, at in zip(values, row, strict=True)),
            id="-".join(label[at] for label, at in zip(labels, row, strict=True)),
            marks=() if row in daily else pytest.mark.nightly,
        )
        for row in itertools.product(*(range(len(factor)) for factor in values))
    ]
    return pytest.mark.parametrize(names, cases)
