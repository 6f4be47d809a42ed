"""All fields that a strategy of `decide` should have, beside what it says: for the tests of torch and of kernels."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gradent.kernels.strategy import Product, decide

Given = dict[str, Any]
"""A product's fields."""

Wanted = dict[int, dict[str, object]]
"""A budget to all fields of the strategy under it."""


def want(
    reducer: str,
    *,
    backend: str = "torch",
    form: str = "outer",
    tile: tuple[int, int] | None = None,
    depth: int = 128,
    scratch: int,
    flops: int,
    rows: int,
    refused: int = 0,
    why: str,
) -> dict[str, object]:
    """All fields of a strategy; of `why` some words."""
    return dict(locals())


def check(given: Given, wanted: Wanted) -> None:
    """What `decide` says under each of the budgets is what is wanted."""
    for budget, fields in wanted.items():
        said = asdict(decide(Product(**given), budget))
        assert str(fields["why"]) in said["why"], budget
        assert said | {"why": fields["why"]} == fields, budget
