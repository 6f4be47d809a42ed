"""From uses to lines of a table: nothing is left out, kinds of layers are grouped, and costs are the plan's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gradent.errors import MemoryBudgetError
from gradent.hooks.uses.uses import COPIES
from gradent.kernels.common.budget import BATCH, HELD
from gradent.kernels.common.cost import GRAM_COST, batch_scratch, cheapest
from gradent.planning.cost import CostSetting, plan_lines, sum_lines
from gradent.planning.trace import ParameterUse

SETTING = CostSetting(tokens=512, budget=2**28)


def used(parameter: str, kind: str = "matrix", shape: tuple[int, ...] = (4096, 4096), **fields: object) -> ParameterUse:
    return ParameterUse(parameter=parameter, kind=kind, shape=shape, **fields)  # type: ignore[arg-type]


def layers(count: int, name: str = "mlp.up_proj.weight", **fields: object) -> list[ParameterUse]:
    return [used(f"model.layers.{number}.{name}", **fields) for number in range(count)]


def test_layers_that_differ_in_their_number_alone_are_one_line() -> None:
    (line,) = plan_lines(layers(30), SETTING)
    one = cheapest((512, 512), 4096, 4096, itemsize=4, budget=2**28)
    assert (line.name, line.count) == ("model.layers.*.mlp.up_proj", 30)
    assert (line.form, line.tile, line.flops, line.scratch) == ("gram", (512, 512), 30 * one.flops, one.scratch)
    assert line.elements == 30 * 4096 * 4096


def test_other_shapes_or_kinds_are_lines_of_their_own() -> None:
    uses = layers(2) + layers(2, shape=(512, 4096)) + layers(2, kind="explicit")
    assert [(line.count, line.shape, line.form) for line in plan_lines(uses, SETTING)] == [
        (2, (4096, 4096), "gram"),
        (2, (512, 4096), "outer"),
        (2, (4096, 4096), "explicit"),
    ]


def test_every_kind_is_listed_and_every_number_counted_once() -> None:
    uses = [
        used("wte.weight", "lookup", (1000, 64)),
        used("wte.weight", "matrix", (1000, 64)),
        used("ln.weight", "sum", (64,)),
        used("ln.bias", "sum", (64,)),
        used("conv.weight", "explicit", (64, 1, 4)),
        used("pooler.weight", "unused", (64, 64)),
    ]
    lines = plan_lines(uses, SETTING)
    assert [(line.name, line.form) for line in lines] == [
        ("wte", "lookup"),
        ("wte", "outer"),
        ("ln", "sum"),
        ("ln.bias", "sum"),
        ("conv", "explicit"),
        ("pooler", "unused"),
    ]
    assert sum(line.elements for line in lines) == 1000 * 64 + 64 + 64 + 256 + 4096
    assert all((line.flops > 0) == (line.form != "unused") for line in lines)
    assert max(line.scratch for line in lines) <= SETTING.budget


def test_lora_shows_its_rank() -> None:
    uses = [
        used("base_model.model.layers.0.q_proj.lora_A.default.weight", shape=(16, 4096)),
        used("base_model.model.layers.0.q_proj.lora_B.default.weight", shape=(1024, 16)),
    ]
    lines = plan_lines(uses, SETTING)
    assert [(line.name, line.rank, line.form) for line in lines] == [
        ("layers.*.q_proj.lora_A", 16, "outer"),
        ("layers.*.q_proj.lora_B", 16, "outer"),
    ]


def test_small_outer_products_of_a_batch_are_formed_at_once() -> None:
    uses = [used("lora_A.weight", shape=(16, 4096))]
    (alone,) = plan_lines(uses, SETTING)
    (four,) = plan_lines(uses, replace(SETTING, groups=8, together=4))
    (many,) = plan_lines(uses, replace(SETTING, groups=8, together=8))
    assert (alone.rows, four.rows, many.rows) == (2, 8, 2)
    assert four.scratch == batch_scratch(8, 512, 16, 4096, itemsize=4) <= BATCH
    assert four.flops == many.flops == 8 * alone.flops


def test_rows_of_several_forwards_are_reduced_pair_by_pair_unless_their_products_fold() -> None:
    several = CostSetting(tokens=100, together=4, rows=5, budget=2**28)
    for shape, whole in (((240, 240), False), ((240, 16), True)):
        (line,) = plan_lines([used("proj.weight", shape=shape)], several)
        assert (line.form, line.rows) == ("outer", 8 if whole else 2)
        (line,) = plan_lines([used("proj.weight", shape=shape)], replace(several, rows=8))
        assert (line.form, line.rows) == ("outer", 8)


def test_a_tied_head_is_reduced_pair_by_pair_ahead_of_its_lookups() -> None:
    head = used("embed.weight", shape=(300, 16))
    batch = replace(SETTING, tokens=64, together=4, rows=8)
    (untied,) = plan_lines([head], batch)
    _, tied = plan_lines([replace(head, kind="lookup"), head], batch)
    assert (untied.rows, tied.rows, untied.waiting > 0, tied.waiting) == (8, 2, True, 0)


def test_sums_take_all_rows_of_a_forward() -> None:
    norm = used("norm.weight", kind="sum", shape=(32,))
    (one,) = plan_lines([norm], SETTING)
    (eight,) = plan_lines([norm], replace(SETTING, together=4, rows=8))
    assert eight.scratch == 4 * one.scratch == 8 * 4 * 32 * (COPIES * 512 + 2)
    (tight,) = plan_lines([norm], replace(SETTING, together=4, rows=8, budget=2**15))
    assert tight.scratch == 2**15


def test_what_waits_for_others_counts() -> None:
    uses = [used(f"layers.{number}.lora_A.weight", shape=(16, 256)) for number in range(4)]
    lines = plan_lines(uses, replace(SETTING, tokens=64))
    rows = 2 * 4 * 16 * 256
    assert (lines[0].count, lines[0].waiting) == (4, rows)
    assert sum_lines(lines, SETTING, 10**6).scratch == max(2 * 4 * rows, 4 * rows + lines[0].scratch)
    many = plan_lines(uses * 100, SETTING)
    assert sum_lines(many, SETTING, 10**6).scratch == 2 * HELD
    several = replace(SETTING, together=4, rows=5)
    assert sum_lines(plan_lines(uses * 100, several), several, 10**6).scratch == 3 * HELD
    plain = replace(SETTING, tokens=64, is_plain=True)
    assert sum_lines(plan_lines(uses, plain), plain, 10**6).scratch == 3 * 4 * rows


def test_experts_share_the_tokens() -> None:
    (line,) = plan_lines([used("experts", shape=(4096, 4096), slots=8, density=2.0)], SETTING)
    one = cheapest((128, 128), 4096, 4096, itemsize=4, budget=2**28)
    assert (line.tile, line.flops, line.elements) == ((128, 128), 8 * one.flops, 8 * 4096**2)
    (few,) = plan_lines([used("experts", shape=(64, 64), slots=8, density=2.0)], replace(SETTING, tokens=3))
    assert few.flops == 6 * cheapest((1, 1), 64, 64, itemsize=4, budget=2**28).flops, "two experts meet no token"


def test_the_choice_follows_cost_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = layers(1)
    (small,) = plan_lines(uses, replace(SETTING, budget=2**16))
    assert small.scratch <= 2**16 and small.tile < (512, 512)
    with pytest.raises(MemoryBudgetError, match="needs 8 bytes"):
        plan_lines(uses, replace(SETTING, budget=3))
    monkeypatch.setitem(GRAM_COST, "torch", 3.0)
    assert plan_lines(uses, SETTING)[0].form == "outer"


def test_totals() -> None:
    lines = plan_lines(layers(2), SETTING)
    elements = 2 * 4096**2
    full = sum_lines(lines, SETTING, elements)
    assert full.flops == sum(line.flops for line in lines)
    assert full.pass_flops == 6 * elements * 2 * 512
    assert full.scratch == lines[0].scratch
    assert sum_lines(lines, replace(SETTING, groups=3), 10 * elements).pass_flops == 3 * 42 * elements * 2 * 512


def reduced_by(pairs: int, shape: tuple[int, int], tokens: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What dispatch really takes for such operands: "gram" or "outer" of the kernels, or "torch"."""
    from benchmarks.reduced import reduce_rows  # noqa: PLC0415
    from gradent.kernels.common.wanted import Wanted  # noqa: PLC0415
    from gradent.kernels.gram import triton as gram  # noqa: PLC0415  (imports Triton, which is optional)
    from gradent.kernels.outer import triton as outer  # noqa: PLC0415

    took: list[str] = []

    def spy(module: Any, name: str) -> None:
        kernel = getattr(module, f"{name}_entries")
        monkeypatch.setattr(module, f"{name}_entries", lambda *args, **kw: took.append(name) or kernel(*args, **kw))

    with monkeypatch.context() as monkeypatch:
        spy(gram, "gram")
        spy(outer, "outer")
        u, v = (torch.randn(2 * pairs, tokens, size) for size in shape)
        reduce_rows(u, v, Wanted.pairs(pairs), budget=budget)
    return took[0] if took else "torch"


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize(("shape", "tokens"), [((70, 40), 5), ((70, 40), 50), ((4, 200), 33)])
def test_the_plan_of_kernels_is_what_dispatch_does(shape, tokens, pairs, monkeypatch) -> None:
    """The scratch is right to the byte: with that budget the kernel runs, with a byte less it does not."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("operands are on the CPU, where kernels run in Triton's interpreter alone")
    monkeypatch.setenv("GRADENT_KERNELS", "triton")
    setting = replace(SETTING, tokens=tokens, groups=pairs, together=pairs, rows=2 * pairs, has_kernels=True)
    (line,) = plan_lines([used("up.weight", shape=shape)], setting)
    assert (line.path, line.refused, line.rows) == ("triton", 0, 2 * pairs)
    assert line.form == reduced_by(pairs, shape, tokens, line.scratch, monkeypatch)
    (alone,) = plan_lines([used("up.weight", shape=shape)], replace(setting, together=1, rows=2))
    (below,) = plan_lines([used("up.weight", shape=shape)], replace(setting, budget=alone.scratch - 1))
    assert (below.path, below.refused) == ("torch", alone.scratch)
    assert below.scratch < alone.scratch
    assert reduced_by(pairs, shape, tokens, alone.scratch - 1, monkeypatch) == "torch"
