"""What a measurement will do to each kind of layer, and what it costs: from uses and lengths alone.

Letters: T tokens of a row, O and I the two sides of a weight, k pairs measured together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gradent.audit.shell import Used
from gradent.kernels.plan import batch_scratch, choose

__all__ = ["Line", "Setting", "Totals", "plan_lines", "sum_lines"]

_LORA = re.compile(r"lora_(embedding_)?([AB])\b")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan is made for.

    Attributes:
        tokens: T, of the chosen and of the rejected row, prompt included. The head's products are counted over all T,
            as of a row without a prompt; a model that forms no logits of prompts needs fewer.
        pairs: pairs in all.
        together: k.
        itemsize: bytes of an accumulating element.
        widen: operands are narrower than that.
        budget: bytes that the tiles may take.
        batch_budget: bytes up to which the outer form takes all rows at once.
        price: of a gram flop, as `choose` takes it.
    """

    tokens: int
    pairs: int = 1
    together: int = 1
    itemsize: int = 4
    widen: bool = False
    budget: int
    batch_budget: int
    price: float | Callable[[], float] = 1.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One kind of layer.

    Attributes:
        name: of its parameters, `*` for a layer's number.
        count: how many there are.
        shape: of one; of an expert's matrix where a parameter holds several.
        slots: matrices that one holds.
        rank: r of a LoRA factor.
        form: "gram", "outer", "lookup", "sum", "explicit" or "unused".
        tile: sides of a tile: tokens for gram, O and I for outer; None for the other forms.
        rows: rows of the batch that are reduced at once.
        flops: of all of them and all pairs.
        scratch: bytes that the reduction of one holds at once.
        elements: numbers that all of them hold; 0 on a further line of a parameter that is used in two ways.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    slots: int
    rank: int | None
    form: str
    tile: tuple[int, int] | None
    rows: int
    flops: int
    scratch: int
    elements: int


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums of a plan.

    Attributes:
        flops: of the reductions.
        pass_flops: of one forward and backward of all rows: 6 flops a parameter and token, 4 for a frozen one.
        scratch: the most that a reduction holds at once.
    """

    flops: int
    pass_flops: int
    scratch: int


def plan_lines(uses: Sequence[Used], setting: Setting) -> list[Line]:
    """One line a kind of layer: parameters whose names differ in numbers alone, and that are used alike.

    Args:
        uses: of every trainable parameter.
        setting: lengths, budget and device.

    Returns:
        Lines in the order of the parameters; none is left out.

    Raises:
        MemoryBudgetError: the budget is below the smallest tile.
    """
    groups: dict[tuple[str, Used], list[Used]] = {}
    for use in uses:
        groups.setdefault((_pattern(use.parameter), replace(use, parameter="")), []).append(use)
    lines: list[Line] = []
    seen: set[str] = set()
    for (name, _), alike in groups.items():
        fresh = [use for use in alike if use.parameter not in seen]
        seen.update(use.parameter for use in fresh)
        one = _plan(name, alike[0], setting)
        elements = sum(use.elements for use in fresh)
        lines.append(replace(one, count=len(alike), flops=one.flops * len(alike) * setting.pairs, elements=elements))
    return lines


def sum_lines(lines: Sequence[Line], setting: Setting, parameters: int) -> Totals:
    """Totals over all lines.

    Args:
        lines: of `plan_lines`.
        setting: what they were made for.
        parameters: numbers that the model holds, frozen ones included.

    Returns:
        The totals.
    """
    trained = sum(line.elements for line in lines)
    return Totals(
        flops=sum(line.flops for line in lines),
        pass_flops=(4 * parameters + 2 * trained) * 2 * setting.tokens * setting.pairs,
        scratch=max((line.scratch for line in lines), default=0),
    )


def _pattern(parameter: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.*.mlp.up_proj`, without what PEFT puts around a name."""
    name = parameter.removeprefix("base_model.model.").removesuffix(".weight")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name).removesuffix(".default")


def _plan(name: str, use: Used, setting: Setting) -> Line:
    """The line of a single parameter and pair."""
    form, tile, rows, flops, scratch = _matrix(use, setting) if use.kind == "matrix" else _other(use, setting)
    factor = _LORA.search(use.parameter)
    rank = None
    if factor is not None and len(use.shape) == 2:
        rank = use.shape[0] if factor[2] == "A" else use.shape[1]
    return Line(
        name=name,
        count=1,
        shape=use.shape,
        slots=use.slots,
        rank=rank,
        form=form,
        tile=tile,
        rows=rows,
        flops=flops,
        scratch=scratch,
        elements=use.elements,
    )


def _matrix(use: Used, setting: Setting) -> tuple[str, tuple[int, int], int, int, int]:
    """`(form, tile, rows at once, flops, scratch)` of products: every expert that has tokens has its share of them."""
    height, width = use.shape
    met = math.ceil(setting.tokens * use.density)
    active = min(use.slots, met)
    length = -(-met // active)
    plan = choose(
        length,
        length,
        height,
        width,
        itemsize=setting.itemsize,
        budget=setting.budget,
        widen=setting.widen,
        price=setting.price,
    )
    rows, scratch = 2, plan.scratch
    whole = batch_scratch(
        2 * setting.together, length, height, width, itemsize=setting.itemsize, widen=(setting.widen, setting.widen)
    )
    if plan.form == "outer" and use.slots == 1 and whole <= min(setting.budget, setting.batch_budget):
        return plan.form, (height, width), 2 * setting.together, plan.flops, whole
    return plan.form, plan.tile, rows, active * plan.flops, scratch


def _other(use: Used, setting: Setting) -> tuple[str, None, int, int, int]:
    """The same of what is no product: additions, and three products of numbers for each entry of the two gradients."""
    size, tokens = setting.itemsize, setting.tokens
    if use.kind == "lookup":
        width = use.shape[-1]
        met = math.ceil(tokens * use.density)
        touched = min(2 * met, use.shape[0])
        flops, scratch = 2 * met * width + 6 * touched * width, min(setting.budget, 2 * touched * width * size)
    elif use.kind == "sum":
        flops = 4 * tokens * use.elements + 6 * use.elements
        scratch = min(setting.budget, 2 * size * tokens * use.elements) + 2 * size * use.elements
    elif use.kind == "explicit":
        flops, scratch = 6 * use.elements, 2 * size * use.elements
    else:
        flops = scratch = 0
    return use.kind, None, 2, flops, scratch
