"""The one decision: which reducer takes a product, in which form and tiles, on which backend, and why.

`decide` is a function of numbers alone: no tensors, no caches, no Triton. What reduces calls it
(`gradent.hooks.reduction`, `gradent.kernels.dispatch`), and `gradent plan` prints it.

Letters: N rows, n rows of a group, T tokens, O and I the two sides of a weight, D directions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from gradent.kernels.common.budget import batch_room, waiting_limits
from gradent.kernels.common.cost import DEPTH, GRAM_COST, Tiling, batch_scratch, cheapest
from gradent.kernels.common.numerics import accumulator
from gradent.kernels.common.tiles import gram_bytes, outer_bytes, pick_gram, pick_outer, plan_groups
from gradent.kernels.common.triton_operands import Groups, Spans

__all__ = ["Product", "Reducer", "Strategy", "decide"]

Reducer = Literal["gram", "outer", "materialize", "queue", "group_by_group", "weight_grad_reuse"]


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is to be reduced: the gradients of N rows by a weight, of which groups' products are wanted."""

    rows: int  # N, of the whole micro-batch
    lengths: tuple[int, ...]  # tokens of each row of the largest group, with padding that is not known to be zero
    out: int  # O; all numbers of a gradient where these are materialized
    inp: int = 1  # I
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)  # of u and v
    device: str = "cpu"  # its type
    has_kernels: bool = False  # Triton's kernels take such operands here
    is_complete: bool = False  # all rows are here, in their order, and nothing else of the parameter is held or to come
    is_materialized: bool = False  # gradients are here as such, not as factors
    has_factors: bool = False  # factors of the parameter are held already, or are all that is left to decide about
    can_reuse: bool = False  # the backward that brings the output gradients takes a weight gradient made of all rows
    is_weighted: bool = False  # a preconditioner multiplies the gradients
    directions: int = 0  # D
    waiting: int = 0  # bytes of small gradients that wait to be reduced
    copied: int = 0  # bytes that scaled copies of the factors take

    @property
    def itemsize(self) -> int:
        """Bytes of an accumulating element."""
        return accumulator(*self.dtypes).itemsize

    @property
    def is_widened(self) -> tuple[bool, bool]:
        """Whether u and v are narrower than the accumulator."""
        u, v = (dtype != accumulator(*self.dtypes) for dtype in self.dtypes)
        return u, v

    @property
    def widest(self) -> torch.dtype:
        """The dtype in which a kernel multiplies u and v: their own, or float32 where they differ."""
        u, v = self.dtypes
        return u if u == v else torch.float32

    @property
    def factor_bytes(self) -> int:
        """Bytes of one token's u and v."""
        return self.out * self.dtypes[0].itemsize + self.inp * self.dtypes[1].itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all rows' gradients."""
        return self.rows * self.out * self.inp * self.itemsize

    @property
    def batch_bytes(self) -> int:
        """Bytes of forming all rows' gradients at once."""
        sizes = self.rows, max(self.lengths), self.out, self.inp
        return batch_scratch(*sizes, itemsize=self.itemsize, widen=self.is_widened)

    def room(self, budget: int) -> int:
        """Bytes that this reduction may take beside what waits and what is copied."""
        return max(budget // 2, budget - self.waiting) - self.copied


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a product is reduced."""

    reducer: Reducer  # key of `gradent.hooks.reduction.collector.REDUCERS`
    backend: Literal["torch", "triton"] = "torch"
    form: Literal["gram", "outer"] = "outer"
    tile: tuple[int, int] | None = None  # tokens for gram, O and I for outer; None where gradients are there as such
    depth: int = DEPTH  # length of the contracted axis that is taken at once
    scratch: int  # bytes that are held at once
    flops: int = 0  # of one group's products
    rows: int  # that are reduced at once
    refused: int = 0  # bytes that a kernel would hold, where torch reduces because they are over the room; else 0
    why: str  # one plain sentence

    @property
    def tiling(self) -> Tiling:
        """Form, tile and cost alone."""
        assert self.tile is not None
        return Tiling(form=self.form, tile=self.tile, depth=self.depth, flops=self.flops, scratch=self.scratch)


def decide(product: Product, budget: int) -> Strategy:
    """The strategy for a product under `budget` bytes of scratch; raises MemoryBudgetError where no tile fits."""
    if product.is_materialized:
        return _materialized(product, budget)
    if product.directions and product.has_kernels and not product.can_reuse:
        strategy = decide(replace(product, has_kernels=False), budget)
        lack = "in torch, since Triton's kernels have no products with directions"
        return replace(strategy, why=f"{strategy.why}; {lack}")
    room = product.room(budget)
    if product.can_reuse:
        why = "the trainer's backward needs the sum of these gradients, so each of them is formed once for both"
        return Strategy(reducer="weight_grad_reuse", scratch=max(1, room), rows=product.rows, why=why)
    is_smaller = _is_smaller(product, budget)
    is_small = product.gradient_bytes <= waiting_limits(budget)[0]
    if is_smaller and is_small and not product.has_kernels:
        why = "the gradients are smaller than their factors, and so small that they wait for others of their size"
        return _all_rows("queue", product, why)
    refused = 0
    if product.is_complete:
        if product.has_kernels:
            strategy = _by_kernel(product, room)
            if not strategy.refused:
                return strategy
            refused = strategy.refused
        if (
            product.batch_bytes <= batch_room(room, product.device)
            and _tiling(product, room + product.copied).form == "outer"
        ):
            why = "the outer form is the cheaper one, and the gradients of all rows fit at once"
            return replace(_all_rows("outer", product, why), refused=refused)
    if is_smaller:
        why = "the gradients are smaller than their factors, so they are formed as they arrive"
        return _all_rows("queue" if is_small else "materialize", product, why)
    return _group_by_group(product, room + product.copied)  # rows are scaled one by one


def _all_rows(reducer: Reducer, product: Product, why: str) -> Strategy:
    """All rows' gradients in one batched product."""
    return Strategy(
        reducer=reducer,
        tile=(product.out, product.inp),
        scratch=product.batch_bytes,
        flops=_outer_flops(product),
        rows=product.rows,
        why=why,
    )


def _is_smaller(product: Product, budget: int) -> bool:
    """Whether gradients are smaller than their factors and fit at once, and nothing is held as factors."""
    if product.has_factors or product.batch_bytes > batch_room(budget, product.device):
        return False
    return product.out * product.inp * product.itemsize <= max(product.lengths) * product.factor_bytes


def _outer_flops(product: Product) -> int:
    count = len(product.lengths)
    return 2 * product.out * product.inp * (sum(product.lengths) + count * (count + product.directions))


def _tiling(product: Product, room: int, backend: Literal["torch", "triton"] = "torch") -> Tiling:
    return cheapest(
        product.lengths,
        product.out,
        product.inp,
        itemsize=product.itemsize,
        budget=room,
        widen=backend == "torch" and any(product.is_widened),
        weighted=product.is_weighted,
        directions=product.directions,
        gram_cost=GRAM_COST[backend],
    )


def _group_by_group(product: Product, room: int) -> Strategy:
    refused = 0
    if product.has_kernels:
        strategy = _by_kernel(product, room, is_alone=True)
        if not strategy.refused:
            return strategy
        refused = strategy.refused
    tiling = _tiling(product, room)
    why = (
        "a preconditioner needs the gradients' own entries, which the outer form alone has"
        if product.is_weighted
        else f"{tiling.form} is the cheaper form, in tiles of one group after the other"
    )
    return Strategy(
        reducer="group_by_group",
        form=tiling.form,
        tile=tiling.tile,
        depth=tiling.depth,
        scratch=tiling.scratch,
        flops=tiling.flops,
        rows=len(product.lengths),
        refused=refused,
        why=why,
    )


def _materialized(product: Product, budget: int) -> Strategy:
    """Gradients that are there as such: wait for others, all rows at once, or one group after the other."""
    count, size = len(product.lengths), product.out * product.inp * product.itemsize
    flops, held = 2 * product.out * product.inp * count * (count + product.directions), 2 * product.gradient_bytes
    if product.gradient_bytes <= waiting_limits(budget)[0]:
        why = "the gradients are so small that they wait for others of their size"
        return Strategy(reducer="queue", scratch=held, flops=flops, rows=product.rows, why=why)
    if held <= batch_room(product.room(budget), product.device):
        why = "the gradients of all rows, and a copy of them, fit at once"
        return Strategy(reducer="materialize", scratch=held, flops=flops, rows=product.rows, why=why)
    why = "the gradients are large, so they are put side by side one group after the other"
    return Strategy(reducer="group_by_group", scratch=count * size, flops=flops, rows=count, why=why)


def _by_kernel(product: Product, room: int, *, is_alone: bool = False) -> Strategy:
    """One launch of Triton's kernels, for one group or all; `refused` is what it would hold if that does not fit."""
    groups = 1 if is_alone else -(-product.rows // len(product.lengths))
    tiling = _tiling(product, room + product.copied, "triton")  # for the form alone
    tile, scratch, flops = _kernel_cost(tiling.form, product, groups, room, tiling.flops)
    share = "each group" if is_alone else "all groups"
    return Strategy(
        reducer="group_by_group" if is_alone else tiling.form,
        backend="triton",
        form=tiling.form,
        tile=tile,
        scratch=scratch,
        flops=flops,
        rows=groups * len(product.lengths),
        refused=scratch if scratch > room else 0,
        why=f"{tiling.form} is the cheaper form, in one launch of Triton's kernel for {share}",
    )


def _kernel_cost(
    form: Literal["gram", "outer"], product: Product, groups: int, room: int, flops: int
) -> tuple[tuple[int, int], int, int]:
    """`(tile, scratch, flops of a group)` of one launch for some groups of n rows; `flops` as torch counts them."""
    length, count, wide = max(product.lengths), len(product.lengths), product.widest
    members = [range(group * count, group * count + count) for group in range(groups)]
    rows = Spans.padded(groups, length) if count == 2 else Groups.padded(length, [length] * (groups * count), members)
    copied = 0
    if count != 2 and not product.is_complete:  # rows of one group are put side by side
        copied = sum(product.lengths) * product.factor_bytes
    if form == "outer" and count == 2:
        config = pick_outer(wide, product.out, product.inp, groups, store=False)
        return (config.rows, config.cols), outer_bytes(product.out, product.inp, groups, config), flops
    if form == "outer":
        assert isinstance(rows, Groups)
        plan = plan_groups(wide, product.out, product.inp, rows, budget=room - copied)
        planned = plan.large.config if plan.large else plan.small
        assert planned is not None
        return (planned.rows, planned.cols), plan.scratch + copied, flops
    config = pick_gram(wide, length, rows.pairs)
    whole, rest = divmod(length, config.rows)
    triangle = (length**2 + whole * config.rows**2 + rest**2) // 2  # tiles on and below the diagonal
    blocks = count * triangle + count * (count - 1) // 2 * length**2
    return (config.rows, config.cols), gram_bytes(wide, rows) + copied, 2 * (product.out + product.inp) * blocks
