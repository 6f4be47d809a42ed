"""What a measurement will do to each kind of layer, and what it costs: from uses and lengths alone.

Letters: T tokens of a row, O and I the two sides of a weight, k pairs measured together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from gradent.hooks.reduction.small_gradients import is_small, most_held
from gradent.hooks.uses.uses import COPIES
from gradent.kernels.common.cost import batch_scratch, choose, tile_room
from gradent.planning.trace import Used

__all__ = ["Line", "Setting", "Totals", "plan_lines", "sum_lines"]

_LORA = re.compile(r"lora_(embedding_)?([AB])\b")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan is made for.

    Attributes:
        tokens: T, of the chosen and of the rejected row, prompt included. The head's products are counted over all T,
            as of a row without a prompt; a model that forms no logits of prompts needs fewer.
        pairs: pairs in all.
        together: k, measured together.
        rows: rows of the largest forward.
        plain: whether autograd's own gradients are taken, every row having a forward of its own.
        itemsize: bytes of an accumulating element.
        widen: operands are narrower than that.
        budget: bytes that the tiles may take.
        limit: bytes that were given for explicit gradients too; None for no limit.
        batch_budget: bytes up to which the outer form takes all rows at once.
        price: of a gram flop, as `choose` takes it.
        operands: dtype of u and v where Triton's kernels reduce products; None where torch does.
    """

    tokens: int
    pairs: int = 1
    together: int = 1
    rows: int = 2
    plain: bool = False
    itemsize: int = 4
    widen: bool = False
    budget: int
    limit: int | None = None
    batch_budget: int
    price: float | Callable[[], float] = 1.0
    operands: torch.dtype | None = None

    @property
    def shared(self) -> bool:
        """Whether all rows that are measured together share one forward."""
        return self.rows == 2 * self.together


@dataclass(frozen=True, kw_only=True)
class Line:
    """One kind of layer.

    Attributes:
        name: of its parameters, `*` for a layer's number.
        count: how many there are.
        shape: of one; of an expert's matrix where a parameter holds several.
        slots: matrices that one holds.
        rank: r of a LoRA factor.
        form: "gram", "outer", "lookup", "sum", "explicit" or "unused"; "whole" where autograd forms the gradient.
        tile: sides of a tile: tokens for gram, O and I for outer; None for the other forms.
        rows: rows of the batch that are reduced at once.
        flops: of all of them and all pairs.
        scratch: bytes that the reduction of one holds at once.
        waiting: bytes of one's gradients, of all rows, that wait for others to be reduced with; 0 where none do.
        elements: numbers that all of them hold; 0 on a further line of a parameter that is used in two ways.
        path: "triton" or "torch", what reduces products; "" for the other forms, which are torch's everywhere.
        refused: bytes that the kernel would hold, where torch reduces because these are more than the budget; else 0.
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
    waiting: int = 0
    path: str = ""
    refused: int = 0


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums of a plan.

    Attributes:
        flops: of the reductions.
        pass_flops: of one forward and backward of all rows: 6 flops a parameter and token, 4 for a frozen one.
        scratch: the most that reductions hold at once, with what waits to be reduced.
        waiting: bytes of small gradients that wait at once, at most.
    """

    flops: int
    pass_flops: int
    scratch: int
    waiting: int


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
    looked = {use.parameter for use in uses if use.kind == "lookup"}
    groups: dict[tuple[str, Used], list[Used]] = {}
    for use in uses:
        groups.setdefault((_pattern(use.parameter), replace(use, parameter="")), []).append(use)
    lines: list[Line] = []
    seen: set[str] = set()
    for (name, _), alike in groups.items():
        fresh = [use for use in alike if use.parameter not in seen]
        seen.update(use.parameter for use in fresh)
        one = _plan(name, alike[0], setting, tied=alike[0].parameter in looked)
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
    largest = max((line.scratch for line in lines), default=0)
    waiting = min(sum(line.waiting * line.count for line in lines), most_held(setting.budget))
    if setting.plain:  # all of it is there when the last backward is over
        scratch = sum(line.scratch * line.count for line in lines)
    else:  # what waits is copied side by side, and before that put together where rows were in several forwards
        # A tile is made smaller where not enough of the budget is left beside what waits.
        beside = max(largest, min(largest + waiting, setting.budget))
        scratch = max(beside, (2 if setting.shared else 3) * waiting)
    return Totals(
        flops=sum(line.flops for line in lines),
        pass_flops=(4 * parameters + 2 * trained) * 2 * setting.tokens * setting.pairs,
        scratch=scratch,
        waiting=waiting,
    )


def _pattern(parameter: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.*.mlp.up_proj`, without what PEFT puts around a name."""
    name = parameter.removeprefix("base_model.model.").removesuffix(".weight")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name).removesuffix(".default")


@dataclass(frozen=True, kw_only=True)
class _Reduced:
    """How a single parameter and pair are reduced; fields as in `Line`."""

    form: str
    tile: tuple[int, int] | None = None
    rows: int = 2
    flops: int
    scratch: int
    waiting: int = 0
    path: str = ""
    refused: int = 0


def _plan(name: str, use: Used, setting: Setting, *, tied: bool) -> Line:
    """The line of a single parameter and pair; `tied` if it is looked up as well."""
    if setting.plain and use.kind != "unused":
        one = _whole(use, setting)
    else:
        one = _matrix(use, setting, tied=tied) if use.kind == "matrix" else _other(use, setting)
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
        form=one.form,
        tile=one.tile,
        rows=one.rows,
        flops=one.flops,
        scratch=one.scratch,
        elements=use.elements,
        waiting=one.waiting,
        path=one.path,
        refused=one.refused,
    )


def _whole(use: Used, setting: Setting) -> _Reduced:
    """What autograd forms: the products are its own, and what is held is copied twice while it is reduced."""
    rows = 2 * setting.together
    flops = 6 * use.elements
    if use.kind == "matrix":
        flops += 4 * math.ceil(setting.tokens * use.density) * math.prod(use.shape)
    else:
        flops += 4 * setting.tokens * use.elements if use.kind == "sum" else 2 * setting.tokens * use.shape[-1]
    return _Reduced(form="whole", rows=rows, flops=flops, scratch=3 * rows * setting.itemsize * use.elements)


def _small(elements: int, setting: Setting) -> int:
    """Bytes of all rows' gradients, where these are so small that they wait for others; else 0."""
    size = 2 * setting.together * setting.itemsize * elements
    return size if is_small(size, setting.budget) else 0


def _matrix(use: Used, setting: Setting, *, tied: bool) -> _Reduced:
    """Products: every expert that has tokens has its share of them. In the order in which dispatch and ledger try."""
    # A head that waits for its lookups is reduced pair by pair, ahead of them.
    shared = setting.shared and not tied
    height, width = use.shape
    met = math.ceil(setting.tokens * use.density)
    active = min(use.slots, met)
    length = -(-met // active)
    refused = 0
    if setting.operands is not None and use.slots == 1 and setting.together > 1 and shared:
        kernel = _kernel(setting.operands, setting.together, length, height, width, setting)
        if kernel.scratch <= setting.budget:
            return kernel
        refused = kernel.scratch
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
    whole = batch_scratch(
        2 * setting.together, length, height, width, itemsize=setting.itemsize, widen=(setting.widen, setting.widen)
    )
    fits = use.slots == 1 and whole <= min(tile_room(setting.budget), setting.batch_budget)
    # A product that is smaller than its factors is formed as it comes, whichever forward its row is in.
    operand = 2 if setting.widen else setting.itemsize
    folds = fits and not tied and height * width * setting.itemsize <= length * (height + width) * operand
    batched = fits and plan.form == "outer" and (shared or folds)
    if setting.operands is not None and not (batched and setting.together > 1):
        kernel = _kernel(setting.operands, 1, length, height, width, setting)
        if kernel.scratch <= setting.budget:
            return replace(kernel, flops=active * kernel.flops)
        refused = kernel.scratch
    if batched:
        rows, tile, scratch = 2 * setting.together, (height, width), whole
    else:
        rows, tile, scratch = 2, plan.tile, plan.scratch
    return _Reduced(
        form=plan.form,
        tile=tile,
        rows=rows,
        flops=active * plan.flops,
        scratch=scratch,
        waiting=_small(height * width, setting) if batched and folds else 0,
        path="torch",
        refused=refused,
    )


def _kernel(dtype: torch.dtype, pairs: int, length: int, height: int, width: int, setting: Setting) -> _Reduced:
    """What one launch of Triton's kernels for `pairs` pairs takes; the form is chosen as in `dispatch`."""
    from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415
    from gradent.kernels.common.triton_tiles import pick_gram, pick_outer  # noqa: PLC0415
    from gradent.kernels.gram.triton import gram_scratch  # noqa: PLC0415  (imports Triton)
    from gradent.kernels.outer.triton import outer_scratch  # noqa: PLC0415

    plan = choose(length, length, height, width, itemsize=4, budget=setting.budget, price=setting.price)
    u, v = (torch.empty(pairs * length, size, dtype=dtype, device="meta") for size in (height, width))
    factors = (u, v, u, v, Spans.padded(pairs, length))
    if plan.form == "outer":
        config, scratch = pick_outer(dtype, height, width, pairs, store=False), outer_scratch(*factors)
        flops = plan.flops
    else:
        config, scratch = pick_gram(dtype, length, pairs), gram_scratch(*factors)
        count, rest = divmod(length, config.rows)
        own = (length**2 + count * config.rows**2 + rest**2) // 2  # tiles on and below the diagonal
        flops = 2 * (height + width) * (2 * own + length**2)
    return _Reduced(
        form=plan.form,
        tile=(config.rows, config.cols),
        rows=2 * pairs,
        flops=flops,
        scratch=scratch,
        path="triton",
    )


def _other(use: Used, setting: Setting) -> _Reduced:
    """What is no product: additions, and three products of numbers for each entry of the two gradients."""
    size, tokens, waiting = setting.itemsize, setting.tokens, 0
    if use.kind == "lookup":
        width = use.shape[-1]
        met = math.ceil(tokens * use.density)
        touched = min(2 * met, use.shape[0])
        flops, scratch = 2 * met * width + 6 * touched * width, min(setting.budget, 2 * touched * width * size)
    elif use.kind == "sum":
        flops = 4 * tokens * use.elements + 6 * use.elements
        position = setting.rows * size * use.elements  # one of every row's, which is the least that is taken
        scratch = max((COPIES + 2) * position, min(setting.budget, (COPIES * tokens + 2) * position))
        waiting = _small(use.elements, setting)
    elif use.kind == "explicit":  # both as they are, and once more in the accumulator's dtype
        flops, scratch = 6 * use.elements, 2 * use.elements * (size + (2 if setting.widen else size))
    else:
        flops = scratch = 0
    return _Reduced(form=use.kind, flops=flops, scratch=scratch, waiting=waiting)
