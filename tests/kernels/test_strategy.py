"""`decide` over random shapes: the least flops among the forms that fit, within the budget, and the same every time."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as every

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradent.errors import MemoryBudgetError
from gradent.kernels.common.budget import BATCH, tile_room
from gradent.kernels.strategy import Product, decide

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

lengths = st.lists(st.integers(0, 90), min_size=1, max_size=5).map(tuple)
products = st.builds(
    Product,
    rows=st.just(0),
    lengths=lengths,
    out=st.integers(1, 300),
    inp=st.integers(1, 300),
    dtypes=st.sampled_from(list(every(DTYPES, DTYPES))),
    device=st.sampled_from(["cpu", "cuda"]),
    has_kernels=st.booleans(),
    is_complete=st.booleans(),
    has_factors=st.booleans(),
    is_weighted=st.booleans(),
    directions=st.integers(0, 2),
    waiting=st.integers(0, 2**18),
    copied=st.integers(0, 2**14),
)
budgets = st.integers(10, 24).map(lambda power: 2**power)
groups = st.integers(1, 6)


def entries(lengths: tuple[int, ...], tile: tuple[int, int]) -> int:
    """Entries of the blocks that gram forms, counted one tile after the other."""
    total = 0
    for first, second in every(range(len(lengths)), repeat=2):
        for top in range(0, lengths[first], tile[0]):
            for left in range(0, lengths[second], tile[1]):
                is_mirrored = first == second and tile[0] == tile[1] and left > top
                if first <= second and not is_mirrored:
                    total += min(tile[0], lengths[first] - top) * min(tile[1], lengths[second] - left)
    return total


def brute(product: Product, room: int) -> tuple[int, str]:
    """Flops and form of the cheapest way: of each form the first of ever smaller tiles that fits."""
    count, wide = len(product.lengths), product.itemsize
    longest, widen = max(*product.lengths, 1), any(product.is_widened)
    ways = []
    sizes = {"gram": ((longest, longest), max(product.out, product.inp), 2)}
    sizes["outer"] = ((product.out, product.inp), longest, count + product.directions + product.is_weighted)
    for form, (tile, depth, held) in sizes.items():
        if form == "gram" and product.is_weighted:
            continue
        depth = min(depth, 128) if widen else depth
        while True:
            if wide * (held * tile[0] * tile[1] + widen * depth * sum(tile)) <= tile_room(room):
                break
            if tile == (1, 1):
                depth //= 2
            else:
                side = int(tile[0] < tile[1])
                tile = tuple(-(-size // 2) if place == side else size for place, size in enumerate(tile))  # type: ignore[assignment]
        total = sum(product.lengths)
        area = product.out * product.inp
        if form == "gram":
            flops = 2 * (product.out + product.inp) * entries(product.lengths, tile)
            flops += 2 * product.directions * total * area
        else:
            flops = 2 * area * (total + count * (count + product.directions))
        ways.append((flops, form))
    return min(ways, key=lambda way: (way[0], way[1] == "gram"))


@settings(max_examples=200, deadline=None)
@given(products, budgets)
def test_a_group_takes_the_least_flops_that_fit(product: Product, budget: int) -> None:
    product = replace(product, rows=len(product.lengths), has_kernels=False, has_factors=True, is_complete=False)
    strategy = decide(product, budget)
    assert strategy.reducer == "group_by_group" and strategy.backend == "torch"
    assert (strategy.flops, strategy.form) == brute(product, product.room(budget) + product.copied)
    assert strategy.scratch <= tile_room(product.room(budget) + product.copied)


@settings(max_examples=300, deadline=None)
@given(products, budgets, groups)
def test_what_is_decided_fits_and_says_why(product: Product, budget: int, count: int) -> None:
    product = replace(product, rows=count * len(product.lengths))
    if torch.float64 in product.dtypes:
        product = replace(product, has_kernels=False)
    strategy = decide(product, budget)
    assert strategy == decide(product, budget)
    assert strategy.why and strategy.rows <= max(product.rows, len(product.lengths))
    room = product.room(budget) + product.copied * (strategy.reducer == "group_by_group")
    if strategy.reducer in ("queue", "materialize"):
        assert not product.has_factors
        assert product.out * product.inp * product.itemsize <= max(product.lengths) * (
            product.out * product.dtypes[0].itemsize + product.inp * product.dtypes[1].itemsize
        )
        assert strategy.scratch <= tile_room(budget) and (product.device != "cpu" or strategy.scratch <= BATCH)
    else:
        assert strategy.scratch <= room
    if strategy.reducer in ("gram", "outer"):
        assert product.is_complete
        assert strategy.backend == "triton" or strategy.form == "outer"
    if strategy.backend == "triton":
        assert product.has_kernels and not product.directions and strategy.refused == 0
    elif product.has_kernels and product.directions:
        assert "no products with directions" in strategy.why
    if strategy.refused:
        assert strategy.refused > room and product.has_kernels


@pytest.mark.parametrize("form", ["gram", "outer"])
@pytest.mark.parametrize("dtypes", list(every([torch.float32, torch.bfloat16, torch.float16], repeat=2)))
def test_a_launch_holds_what_is_said(dtypes: tuple[torch.dtype, torch.dtype], form: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415  (imports Triton)
    from gradent.kernels.gram.triton import gram_scratch  # noqa: PLC0415
    from gradent.kernels.outer.triton import outer_scratch  # noqa: PLC0415

    pairs, tokens, out, inp = 64, *((70, 400, 320) if form == "gram" else (300, 130, 129))
    shape = Product(
        rows=2 * pairs, lengths=(tokens,) * 2, out=out, inp=inp, dtypes=dtypes, has_kernels=True, is_complete=True
    )
    strategy = decide(shape, 2**26)
    sides = [torch.empty(pairs * tokens, size, dtype=dtype) for size, dtype in zip((out, inp), dtypes, strict=True)]
    needed = gram_scratch if form == "gram" else outer_scratch
    assert (strategy.form, strategy.backend) == (form, "triton")
    assert strategy.scratch == needed(*sides, *sides, Spans.padded(pairs, tokens))


@settings(max_examples=100, deadline=None)
@given(products, budgets, groups)
def test_gradients_that_are_there_wait_or_are_reduced(product: Product, budget: int, count: int) -> None:
    product = replace(product, rows=count * len(product.lengths), inp=1, is_materialized=True, has_kernels=False)
    strategy = decide(product, budget)
    small = product.gradient_bytes <= min(512 * 2**10, budget // 4)
    assert (strategy.reducer == "queue") is small
    assert strategy.reducer in ("queue", "materialize", "group_by_group")


def test_the_rules_of_a_few_known_layers() -> None:
    """As docs/kernels.md has them: LoRA outer at any length, full parameters gram below ⅔h, small ones wait."""

    def form(length: int, out: int, inp: int, **fields: object) -> str:
        product = Product(rows=2, lengths=(length, length), out=out, inp=inp, **fields)  # type: ignore[arg-type]
        return decide(product, 2**28).form

    assert form(1200, 4096, 4096) == "gram" and form(1500, 4096, 4096) == "outer"
    assert {form(length, 4096, 16) for length in (16, 64, 512, 8192)} == {"outer"}
    lora = decide(Product(rows=2, lengths=(64, 64), out=16, inp=256), 2**28)
    assert lora.reducer == "queue" and "wait" in lora.why
    assert form(10, 4096, 4096, directions=2) == "outer" and form(10, 4096, 4096, is_weighted=True) == "outer"
    reuse = decide(Product(rows=2, lengths=(64, 64), out=16, inp=256, can_reuse=True), 2**28)
    assert reuse.reducer == "weight_grad_reuse"


def test_no_room_for_a_single_entry_is_refused() -> None:
    with pytest.raises(MemoryBudgetError, match="Give at least that much"):
        decide(Product(rows=3, lengths=(5, 5, 5), out=4, inp=4, has_factors=True), 7)
