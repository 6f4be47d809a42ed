"""The plan: the cheaper form by the cost model, tiles inside the budget, clear words for a budget that is no budget."""

from __future__ import annotations

import pytest

from gradent.errors import MemoryBudgetError
from gradent.kernels.common.cost import choose, parse_budget

LARGE = 2**40


@pytest.mark.parametrize(("rows", "cols"), [(4096, 4096), (1024, 4096), (32000, 288), (4096, 16)])
def test_form_follows_the_two_thirds_rule(rows: int, cols: int) -> None:
    crossover = 2 / 3 * rows * cols / (rows + cols)
    short, long = max(1, int(0.9 * crossover)), int(1.1 * crossover) + 2
    assert choose(short, short, rows, cols, itemsize=4, budget=LARGE).form == "gram"
    assert choose(long, long, rows, cols, itemsize=4, budget=LARGE).form == "outer"


def test_lora_takes_the_outer_form_at_any_length() -> None:
    assert {choose(t, t, 4096, 16, itemsize=4, budget=LARGE).form for t in (16, 64, 512, 8192)} == {"outer"}


def test_a_weighted_metric_needs_the_outer_form() -> None:
    assert choose(2, 2, 4096, 4096, itemsize=4, budget=LARGE, weighted=True).form == "outer"


@pytest.mark.parametrize("budget", [2**12, 2**16, 2**20, 2**28])
@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize(("t_w", "t_l", "rows", "cols"), [(1, 1, 1, 1), (700, 3, 129, 5000), (64, 8192, 14336, 4096)])
def test_scratch_never_exceeds_the_budget(budget: int, widen: bool, t_w: int, t_l: int, rows: int, cols: int) -> None:
    plan = choose(t_w, t_l, rows, cols, itemsize=4, budget=budget, widen=widen)
    assert plan.scratch <= budget
    assert min(*plan.tile, plan.depth) >= 1


def test_a_budget_below_one_entry_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(MemoryBudgetError, match=r"needs (\d+) bytes") as caught:
        choose(5, 7, 30, 40, itemsize=4, budget=3)
    least = int(str(caught.value).split("needs ")[1].split()[0])
    assert choose(5, 7, 30, 40, itemsize=4, budget=least).scratch == least


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (4096, 4096), ("4096", 4096), ("512MiB", 512 * 2**20), ("2 GB", 2 * 10**9), ("1.5kib", 1536)],
)
def test_budgets_that_are_read(given: int | str | None, expected: int | None) -> None:
    assert parse_budget(given) == expected


@pytest.mark.parametrize("given", [0, -1, "lots", "5 parsecs", "", "-3MB", True, 2.5])
def test_budgets_that_are_refused(given: object) -> None:
    with pytest.raises(MemoryBudgetError, match="512MiB"):
        parse_budget(given)  # type: ignore[arg-type]
