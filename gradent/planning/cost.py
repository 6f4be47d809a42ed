"""What a measurement will do to each kind of layer, and what it costs: what `decide` says of uses and lengths.

Letters: T tokens of a row, O and I the two sides of a weight, n rows of a group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gradent.hooks.uses.uses import COPIES
from gradent.kernels.common.budget import waiting_limits
from gradent.kernels.common.numerics import accumulator
from gradent.kernels.strategy import Product, Strategy, decide
from gradent.planning.trace import ParameterUse

__all__ = ["CostSetting", "Line", "Totals", "plan_lines", "sum_lines"]

_LORA = re.compile(r"lora_(embedding_)?([AB])\b")


@dataclass(frozen=True, kw_only=True)
class CostSetting:
    """What a plan is made for."""

    tokens: int  # T, of every row, prompt included; the head counts them all, as where no prompt logits are left out
    groups: int = 1  # in all; pairs, where each has two rows
    together: int = 1  # groups that are measured together
    group: int = 2  # n, rows of a group
    rows: int = 2  # of the largest forward
    is_plain: bool = False  # autograd's own gradients are taken, every row having a forward of its own
    dtype: torch.dtype = torch.float32  # of activations and output gradients
    device: str = "cpu"  # its type
    has_kernels: bool = False  # Triton's kernels reduce products
    budget: int  # bytes that the tiles may take
    limit: int | None = None  # bytes that were given for explicit gradients too; None for no limit

    @property
    def itemsize(self) -> int:
        """Bytes of an accumulating element."""
        return accumulator(self.dtype).itemsize

    @property
    def measured(self) -> int:
        """Rows that are measured together."""
        return self.group * self.together

    def product(self, length: int, shape: tuple[int, int], *, is_complete: bool, has_factors: bool = False) -> Product:
        """What a weight of this shape is to `decide` when the output gradient of a forward's rows arrives."""
        return Product(
            rows=self.measured,
            lengths=(length,) * self.group,
            out=shape[0],
            inp=shape[1],
            dtypes=(self.dtype, self.dtype),
            device=self.device,
            has_kernels=self.has_kernels,
            is_complete=is_complete,
            has_factors=has_factors,
        )

    def materialized(self, elements: int) -> Product:
        """What a parameter of so many numbers is to `decide` whose gradients are there as such."""
        wide = accumulator(self.dtype)
        return Product(
            rows=self.measured,
            lengths=(1,) * self.group,
            out=elements,
            dtypes=(wide, wide),
            device=self.device,
            is_materialized=True,
        )


@dataclass(frozen=True, kw_only=True)
class Line:
    """One kind of layer."""

    name: str = ""  # of its parameters, `*` for a layer's number
    count: int = 1  # how many there are
    shape: tuple[int, ...] = ()  # of one; of an expert's matrix where a parameter holds several
    slots: int = 1  # matrices that one holds
    rank: int | None = None  # r of a LoRA factor
    form: str  # gram, outer, lookup, sum, explicit or unused; "whole" where autograd forms the gradient
    tile: tuple[int, int] | None = None  # tokens for gram, O and I for outer; None for the other forms
    rows: int  # of the batch that are reduced at once
    flops: int  # of all of them and all groups
    scratch: int  # bytes that the reduction of one holds at once
    elements: int = 0  # numbers that all of them hold; 0 on a further line of a parameter that is used in two ways
    waiting: int = 0  # bytes of one's gradients, of all rows, that wait for others to be reduced with
    path: str = ""  # "triton" or "torch" for products; "" for the other forms, which are torch's everywhere
    refused: int = 0  # bytes that the kernel would hold, where torch reduces because they are over the budget; else 0
    strategy: Strategy | None = None  # what `decide` said, for the other forms too where it was asked


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums of a plan."""

    flops: int  # of the reductions
    pass_flops: int  # of one forward and backward of all rows: 6 flops a parameter and token, 4 for a frozen one
    scratch: int  # the most that reductions hold at once, with what waits to be reduced
    waiting: int  # bytes of small gradients that wait at once, at most


def plan_lines(uses: Sequence[ParameterUse], setting: CostSetting) -> list[Line]:
    """One line a kind of layer: parameters whose names differ in numbers alone, and that are used alike."""
    looked = {use.parameter for use in uses if use.kind == "lookup"}
    kinds: dict[tuple[str, ParameterUse], list[ParameterUse]] = {}
    for use in uses:
        kinds.setdefault((_pattern(use.parameter), replace(use, parameter="")), []).append(use)
    lines: list[Line] = []
    seen: set[str] = set()
    for (name, _), alike in kinds.items():
        fresh = [use for use in alike if use.parameter not in seen]
        seen.update(use.parameter for use in fresh)
        line = _line(alike[0], setting, is_tied=alike[0].parameter in looked)
        elements = sum(use.elements for use in fresh)
        flops = line.flops * len(alike) * setting.groups
        lines.append(replace(line, name=name, count=len(alike), flops=flops, elements=elements))
    return lines


def sum_lines(lines: Sequence[Line], setting: CostSetting, parameters: int) -> Totals:
    """Totals over all lines of a model that holds so many numbers, frozen ones included."""
    trained = sum(line.elements for line in lines)
    largest = max((line.scratch for line in lines), default=0)
    waiting = min(sum(line.waiting * line.count for line in lines), waiting_limits(setting.budget)[1])
    if setting.is_plain:  # all of it is there when the last backward is over
        scratch = sum(line.scratch * line.count for line in lines)
    else:  # what waits is copied side by side, and before that put together where rows were in several forwards
        # A tile is made smaller where not enough of the budget is left beside what waits.
        beside = max(largest, min(largest + waiting, setting.budget))
        scratch = max(beside, (2 if setting.rows == setting.measured else 3) * waiting)
    return Totals(
        flops=sum(line.flops for line in lines),
        pass_flops=(4 * parameters + 2 * trained) * setting.group * setting.tokens * setting.groups,
        scratch=scratch,
        waiting=waiting,
    )


def _pattern(parameter: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.*.mlp.up_proj`, without what PEFT puts around a name."""
    name = parameter.removeprefix("base_model.model.").removesuffix(".weight")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name).removesuffix(".default")


def _line(use: ParameterUse, setting: CostSetting, *, is_tied: bool) -> Line:
    """The line of a single parameter and group; `is_tied` if it is looked up as well."""
    if setting.is_plain and use.kind != "unused":
        line = _whole(use, setting)
    else:
        line = _matrix(use, setting, is_tied=is_tied) if use.kind == "matrix" else _other(use, setting)
    factor, rank = _LORA.search(use.parameter), None
    if factor is not None and len(use.shape) == 2:
        rank = use.shape[0] if factor[2] == "A" else use.shape[1]
    return replace(line, shape=use.shape, slots=use.slots, rank=rank, elements=use.elements)


def _matrix(use: ParameterUse, setting: CostSetting, *, is_tied: bool) -> Line:
    """Products, as `decide` takes them; tokens are split evenly over the experts that have any."""
    met = math.ceil(setting.tokens * use.density)
    active = min(use.slots, met)
    length, shape = -(-met // active), (use.shape[0], use.shape[1])
    # A head that waits for its lookups, and experts, are reduced group by group.
    is_alone = is_tied or use.slots > 1
    is_complete = setting.rows == setting.measured and not is_alone
    strategy = decide(setting.product(length, shape, is_complete=is_complete, has_factors=is_alone), setting.budget)
    return Line(
        form=strategy.form,
        tile=strategy.tile,
        rows=strategy.rows,
        flops=active * strategy.flops,
        scratch=strategy.scratch,
        waiting=setting.product(length, shape, is_complete=False).gradient_bytes * (strategy.reducer == "queue"),
        path=strategy.backend,
        refused=strategy.refused,
        strategy=strategy,
    )


def _whole(use: ParameterUse, setting: CostSetting) -> Line:
    """What autograd forms: the products are its own, and what is held is copied twice while it is reduced."""
    flops = setting.group * (setting.group + 1) * use.elements
    if use.kind == "matrix":
        met = math.ceil(setting.tokens * use.density)
        flops += 2 * setting.group * met * math.prod(use.shape)
    elif use.kind == "sum":
        flops += 2 * setting.group * setting.tokens * use.elements
    else:
        flops += setting.group * setting.tokens * use.shape[-1]
    scratch = 3 * setting.measured * setting.itemsize * use.elements
    return Line(form="whole", rows=setting.measured, flops=flops, scratch=scratch)


def _other(use: ParameterUse, setting: CostSetting) -> Line:
    """What is no product of matrices: additions, and products of the gradients' entries."""
    size, tokens, count, waiting = setting.itemsize, setting.tokens, setting.group, 0
    products, strategy = count * (count + 1), None
    if use.kind == "lookup":
        width = use.shape[-1]
        met = math.ceil(tokens * use.density)
        touched = min(count * met, use.shape[0])
        flops = count * met * width + products * touched * width
        scratch = min(setting.budget, count * touched * width * size)
    elif use.kind == "sum":
        flops = 2 * count * tokens * use.elements + products * use.elements
        position = setting.rows * size * use.elements  # one of every row's, which is the least that is taken
        scratch = max((COPIES + 2) * position, min(setting.budget, (COPIES * tokens + 2) * position))
        strategy = decide(setting.materialized(use.elements), setting.budget)
        waiting = setting.materialized(use.elements).gradient_bytes * (strategy.reducer == "queue")
    elif use.kind == "explicit":  # all as they are, and once more in the accumulator's dtype
        held = size if setting.dtype == accumulator(setting.dtype) else 2
        flops, scratch = products * use.elements, count * use.elements * (size + held)
    else:
        flops = scratch = 0
    return Line(form=use.kind, rows=count, flops=flops, scratch=scratch, waiting=waiting, strategy=strategy)
