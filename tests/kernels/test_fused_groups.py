"""Products of rows in groups, both kernels in Triton's interpreter, against gradients held whole in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from benchmarks.reduced import reduce_rows
from gradent.errors import InputError
from gradent.kernels.common import tiles
from gradent.kernels.common.tiles import gram_bytes, group_configs, plan_groups
from gradent.kernels.common.triton_operands import Groups, blank, on_device
from gradent.kernels.common.wanted import Wanted

pytest.importorskip("triton", reason="Triton is not installed")

from gradent.kernels.common import triton_tiles
from gradent.kernels.gram import triton as gram
from gradent.kernels.gram.triton import gram_entries, gram_products, gram_scratch
from gradent.kernels.outer import triton as outer
from gradent.kernels.outer.triton import outer_entries, outer_products
from tests.kernels.operands import DTYPES, draw, products_error, strided

LENGTHS = [5, 0, 17, 3, 33, 1, 20, 4]
PARTITIONS = {
    "alone": [[row] for row in range(8)],
    "pairs": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "threes": [[0, 1, 2], [5, 4, 3]],
    "mixed": [[7], [0, 1, 2, 3, 4], [5, 6]],
    "all": [range(8)],
    "with an empty one": [[], [6, 2, 4]],
}
BUDGET = 2**24


def operands(rows: int = 19, cols: int = 45, dtypes: tuple[torch.dtype, torch.dtype] = DTYPES[0]) -> tuple[Tensor, ...]:
    """u `[N T, O]`, v `[N T, I]`, padded with nan, and the gradients `[N, O, I]` float64."""
    given = draw(LENGTHS[:4], LENGTHS[4:], rows, cols, dtypes)
    u, v = (torch.cat(given.factors[side::2]) for side in (0, 1))
    return u, v, torch.cat([given.chosen, given.rejected])


def grouped(members: list, lengths: list[int] = LENGTHS) -> Groups:
    return Groups.padded(max(LENGTHS) + 1, lengths, members)


def root(rows: int, cols: int) -> Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(1)) + 0.1


def by_outer(u: Tensor, v: Tensor, groups: Groups, weight: Tensor | None = None, budget: int = BUDGET) -> Tensor:
    wide = u.dtype if u.dtype == v.dtype else torch.float32
    plan = plan_groups(wide, u.shape[1], v.shape[1], groups, budget=budget)
    assert plan.scratch <= budget
    return outer_products(u, v, groups, weight, plan=plan, poison=True)


LIMIT = 5e-7 * max(LENGTHS) ** 0.5


@pytest.mark.parametrize(
    ("name", "rows", "cols"),
    [*((name, 19, 45) for name in PARTITIONS), ("mixed", 1, 3), ("mixed", 8, 16), ("threes", 40, 70)],
)
def test_all_products_of_a_group(name: str, rows: int, cols: int) -> None:
    u, v, gradients = operands(rows, cols)
    groups, weight = grouped(PARTITIONS[name]), root(rows, cols)
    assert products_error(gram_products(u, v, groups, poison=True), gradients, groups) <= LIMIT
    assert products_error(by_outer(u, v, groups), gradients, groups) <= LIMIT
    assert products_error(by_outer(u, v, groups, weight), gradients, groups, weight) <= LIMIT


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    u, v, gradients = operands(dtypes=dtypes)
    groups, weight = grouped(PARTITIONS["mixed"]), root(19, 45)
    assert products_error(gram_products(u, v, groups, poison=True), gradients, groups) <= LIMIT
    assert products_error(by_outer(u, v, groups, weight), gradients, groups, weight) <= LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_configurations(dtype: torch.dtype) -> None:
    u, v, gradients = operands(40, 24, dtypes=(dtype, dtype))
    groups = grouped(PARTITIONS["threes"])
    for config in [*group_configs(dtype)[1::5], group_configs(dtype)[-1]]:
        plan = plan_groups(dtype, 40, 24, groups, budget=BUDGET, config=config)
        assert products_error(outer_products(u, v, groups, plan=plan, poison=True), gradients, groups) <= LIMIT, config


def test_a_pair_is_a_group_of_two() -> None:
    """The same bits as by the kernels of pairs, in the same order."""
    u, v, _ = operands()
    given, groups = draw(LENGTHS[:4], LENGTHS[4:], 19, 45), grouped(PARTITIONS["pairs"])
    assert torch.equal(gram_products(u, v, groups).view(4, 3), gram_entries(*given.factors, given.spans))
    assert torch.equal(by_outer(u, v, groups).view(4, 3), outer_entries(*given.factors, given.spans))


def test_memory_that_is_not_contiguous_and_rows_that_are_packed() -> None:
    u, v, gradients = operands()
    groups, weight = grouped(PARTITIONS["mixed"]), root(19, 45)
    packed = [factor[~factor[:, 0].isnan()] for factor in (u, v)]
    for run in (gram_products, lambda u, v, groups: by_outer(u, v, groups, strided(weight))):
        got = run(strided(u), strided(v), groups)
        assert torch.equal(got, run(*packed, Groups(LENGTHS, PARTITIONS["mixed"])))
    assert products_error(got, gradients, groups, weight) <= LIMIT


def test_strides_that_no_tile_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    u, v, _ = operands()
    groups, weight = grouped(PARTITIONS["all"]), root(19, 45)
    near = by_outer(u, v, groups, weight)
    monkeypatch.setattr(triton_tiles, "REACH", 1)
    assert torch.equal(by_outer(u, v, groups, weight), near)


def test_a_smaller_budget_takes_fewer_programs_and_launches() -> None:
    """From a program a tile down to one in all, for one group after the other; below that, what is needed is said."""
    u, v, gradients = operands(70, 40)
    groups = grouped(PARTITIONS["threes"])
    least = plan_groups(torch.float32, 70, 40, groups, budget=0)
    assert (least.large.programs, least.large.together, least.large.config.rows) == (1, 1, 16)
    seen = set()
    for budget in (2**20, 2**16, 2**14, 3 * 2**12, least.scratch):
        plan = plan_groups(torch.float32, 70, 40, groups, budget=budget)
        seen.add((plan.large.programs, plan.large.together, plan.large.config.rows))
        assert products_error(by_outer(u, v, groups, budget=budget), gradients, groups) <= LIMIT
    assert len(seen) >= 4
    assert plan_groups(torch.float32, 70, 40, groups, budget=least.scratch - 1).scratch == least.scratch


def test_tiles_stay_in_the_cache() -> None:
    for count, size in ((1, 3), (1, 8), (1, 64), (8, 8), (300, 3)):
        groups = Groups([1] * (count * size), torch.arange(count * size).view(count, size).tolist())
        plan = plan_groups(torch.bfloat16, 4096, 14336, groups, budget=2**30)
        assert plan.large.tiles <= tiles.CACHE
        assert plan.large.programs * plan.large.together <= tiles.WAVE


def test_the_same_bits_every_time() -> None:
    u, v, _ = operands(70, 40)
    groups = grouped(PARTITIONS["all"])
    assert torch.equal(by_outer(u, v, groups), by_outer(u, v, groups))
    assert torch.equal(gram_products(u, v, groups), gram_products(u, v, groups, poison=True))


def test_scratch_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    u, v, _ = operands(70, 40)
    groups, made = grouped(PARTITIONS["mixed"]), []
    for module in (gram, outer):
        monkeypatch.setattr(module, "blank", lambda *shape, **how: made.append(blank(*shape, **how)) or made[-1])
    gram_products(u, v, groups)
    table = on_device(groups, "products", torch.device("cpu"))
    assert gram_scratch(u, v, u, v, groups) == gram_bytes(torch.float32, groups) == made[0].nbytes + table.nbytes
    made.clear()
    by_outer(u, v, groups)
    held = sum(tensor.nbytes for tensor in made) + 8 * groups.count
    sums = 2 * 8 * (2 * 3 + 8 * 8)  # of two pairs and a group, and side by side
    tables = 8 * (2 * 4 + 2 * (1 + 5))
    assert plan_groups(torch.float32, 70, 40, groups, budget=BUDGET).scratch == held + sums + tables


def test_nothing_to_do() -> None:
    u, v = torch.zeros(0, 5), torch.zeros(0, 7)
    for groups in (Groups([], []), Groups([0, 0], [[]]), Groups([0, 0, 0], [[0, 1, 2]])):
        want = torch.zeros(groups.count, dtype=torch.float64)
        assert torch.equal(gram_products(u, v, groups), want)
        assert torch.equal(by_outer(u, v, groups), want)


def test_the_test_can_fail() -> None:
    u, v, gradients = operands()
    groups = grouped(PARTITIONS["all"])
    for run in (gram_products, by_outer):
        got = run(u, v, groups)
        assert products_error(torch.zeros_like(got), gradients, groups) > 0.1
        assert products_error(got.flip(0), gradients, groups) > 0.1, "in another order"
        for change, least in ((-1, 1e-3), (1, float("inf"))):  # a token is left out; the padding is poisoned
            lengths = [*LENGTHS[:2], LENGTHS[2] + change, *LENGTHS[3:]]
            assert products_error(run(u, v, grouped(PARTITIONS["all"], lengths)), gradients, groups) >= least


def test_what_is_refused() -> None:
    u, v, _ = operands()
    with pytest.raises(InputError, match="none of them negative"):
        Groups([3, -1], [[0, 1]])
    with pytest.raises(InputError, match="rows 0 to 1"):
        Groups([3, 1], [[0, 2]])
    with pytest.raises(InputError, match="none above 2"):
        Groups.padded(2, [3, 1], [[0, 1]])
    with pytest.raises(InputError, match="ends behind the last"):
        gram_products(u, v, Groups([len(u) + 1], [[0]]))
    with pytest.raises(InputError, match=r"weight is \[19, 45\]"):
        by_outer(u, v, grouped(PARTITIONS["all"]), torch.ones(45, 19))


@pytest.mark.parametrize("tokens", [6, 40], ids=["gram", "outer"])
@pytest.mark.parametrize("wanted", [Wanted.sizes([3, 2, 1, 2]), Wanted.all(8), Wanted.sizes([4, 4])], ids=str)
def test_dispatch_gives_the_entries_that_are_wanted(
    wanted: Wanted, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADENT_KERNELS", "triton")
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(8, tokens, width, generator=generator) for width in (20, 40))
    lengths = [tokens, 3, 0, 5, tokens, 1, 2, 4]
    got = reduce_rows(u, v, wanted, budget=BUDGET, lengths=lengths)
    gradients = torch.stack([a[:n].double().T @ b[:n].double() for a, b, n in zip(u, v, lengths, strict=True)])
    want = torch.stack([(gradients[i] * gradients[j]).sum() for i, j in zip(*wanted.places, strict=True)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * float(want.max()))


def test_tiles_are_picked_without_triton() -> None:
    source = "import sys; import gradent.kernels.common.tiles; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
