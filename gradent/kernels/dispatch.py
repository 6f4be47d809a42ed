"""Runs what `decide` says: the reductions of factored gradients, by Triton's kernels or in plain torch.

Letters: N rows, n rows of a group, T tokens, O and I the two sides of a weight, D directions, M entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradent.kernels.availability import announce_budget, attempt, on_kernels
from gradent.kernels.common.account import AccountSums
from gradent.kernels.common.numerics import Factors
from gradent.kernels.common.wanted import Wanted
from gradent.kernels.gram.reference import reduce_gram
from gradent.kernels.outer.reference import account_outer, reduce_all_rows, reduce_outer
from gradent.kernels.strategy import Product, Strategy, decide

if TYPE_CHECKING:
    from gradent.kernels.common.triton_operands import Spans

__all__ = ["account_group", "is_even", "reduce_at_once", "reduce_group"]


def reduce_group(
    factors: Factors, *, budget: int, weight: Tensor | None = None, directions: Tensor | None = None
) -> Tensor:
    """Entries `[m]` float64 of a group, no gradient of which is held whole; `weight` is the metric's root `[O, I]`."""
    u, v = factors[0]
    alike = all(row[0].dtype == u.dtype and row[1].dtype == v.dtype for row in factors)
    product = Product(
        rows=len(factors),
        lengths=tuple(len(row[0]) for row in factors),
        out=u.shape[1],
        inp=v.shape[1],
        dtypes=_widest(factors),
        device=u.device.type,
        has_kernels=alike and on_kernels(u, v),
        has_factors=True,
        is_weighted=weight is not None,
        directions=0 if directions is None else len(directions),
    )
    strategy = decide(product, budget)
    if strategy.refused:
        announce_budget(u.device, strategy.refused, budget)
    if strategy.backend == "triton":
        entries = attempt(u.device, lambda: _by_kernel_alone(factors, strategy, weight))
        if entries is not None:
            return entries
        strategy = decide(replace(product, has_kernels=False), budget)
    if strategy.form == "gram":
        return reduce_gram(factors, strategy.tiling, directions, budget=strategy.scratch)
    return reduce_outer(factors, strategy.tiling, weight, directions)


ACCOUNT_TILES = 32 * 2**20
"""Bytes of a step\'s tiles on a CPU: smaller ones cost more calls, larger ones leave the caches."""


def account_group(factors: Factors, sums: AccountSums, *, budget: int) -> Tensor:
    """Entries `[M]` of a step's account, none of the rows' gradients ever held whole."""
    u, v = factors[0]
    product = Product(
        rows=len(factors),
        lengths=tuple(len(row[0]) for row in factors),
        out=u.shape[1],
        inp=v.shape[1],
        dtypes=_widest(factors),
        device=u.device.type,
        has_factors=True,
        is_weighted=True,
        directions=sums.beside,
    )
    room = min(budget, ACCOUNT_TILES) if u.device.type == "cpu" else budget
    return account_outer(factors, decide(product, room).tiling, sums)


def reduce_at_once(
    strategy: Strategy,
    u: Tensor,
    v: Tensor,
    wanted: Wanted,
    *,
    lengths: Sequence[int] | None = None,
    weight: Tensor | None = None,
    directions: Tensor | None = None,
) -> Tensor | None:
    """Entries `[M]` of all groups, by a strategy "gram" or "outer"; None where a kernel turns out to be impossible."""
    if strategy.backend == "triton":
        return attempt(u.device, lambda: _by_kernel(u, v, wanted, strategy, lengths, weight))
    return reduce_all_rows(u, v, wanted, weight, directions)


def is_even(rows: Tensor) -> bool:
    """Whether `[N, T, ...]` is a view of `[N T, ...]`: its tokens are evenly spaced in memory."""
    return rows.shape[1] > 0 and rows.stride(0) == rows.shape[1] * rows.stride(1)


def _widest(factors: Factors) -> tuple[torch.dtype, torch.dtype]:
    u, v = ({row[side].dtype for row in factors} for side in (0, 1))
    return max(u, key=lambda dtype: dtype.itemsize), max(v, key=lambda dtype: dtype.itemsize)


def _by_kernel_alone(factors: Factors, strategy: Strategy, weight: Tensor | None) -> Tensor:
    """One group's entries `[m]` by a kernel."""
    from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415  (imports Triton)

    lengths = [len(u) for u, _ in factors]
    if len(factors) == 2:
        (u_w, v_w), (u_l, v_l) = factors
        return _launch_pairs(strategy, (u_w, v_w, u_l, v_l), Spans.of_pair(*lengths), weight)
    u, v = (torch.cat(sides) for sides in zip(*factors, strict=True))
    return _launch_groups(strategy, u, v, lengths, None, Wanted.all(len(factors)), weight)


def _by_kernel(
    u: Tensor, v: Tensor, wanted: Wanted, strategy: Strategy, lengths: Sequence[int] | None, weight: Tensor | None
) -> Tensor:
    """All groups' entries `[M]` by a kernel, from u `[N, T, O]` and v `[N, T, I]`."""
    from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415  (imports Triton)

    count, tokens = u.shape[:2]
    u, v, half = u.flatten(0, 1), v.flatten(0, 1), len(u) // 2
    if wanted == Wanted.pairs(half):
        middle = half * tokens
        sides = (u[:middle], v[:middle], u[middle:], v[middle:])
        return _launch_pairs(strategy, sides, Spans.padded(half, tokens, lengths), weight)
    ends = [tokens] * count if lengths is None else list(lengths)
    return _launch_groups(strategy, u, v, ends, tokens, wanted, weight)


def _launch_pairs(
    strategy: Strategy, sides: tuple[Tensor, Tensor, Tensor, Tensor], spans: Spans, weight: Tensor | None
) -> Tensor:
    from gradent.kernels.gram import triton as gram  # noqa: PLC0415  (imports Triton)
    from gradent.kernels.outer import triton as outer  # noqa: PLC0415  (imports Triton)

    if strategy.form == "gram":
        return gram.gram_entries(*sides, spans).flatten()
    return outer.outer_entries(*sides, spans, weight).flatten()


def _launch_groups(
    strategy: Strategy,
    u: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    tokens: int | None,
    wanted: Wanted,
    weight: Tensor | None,
) -> Tensor:
    """Entries `[M]` of rows that lie one after the other in u `[ΣT, O]` and v `[ΣT, I]`, or `tokens` apart."""
    from gradent.kernels.common.tiles import plan_groups  # noqa: PLC0415  (imports Triton)
    from gradent.kernels.common.triton_operands import Groups  # noqa: PLC0415
    from gradent.kernels.gram import triton as gram  # noqa: PLC0415
    from gradent.kernels.outer import triton as outer  # noqa: PLC0415

    members = wanted.groups
    groups = Groups(lengths, members) if tokens is None else Groups.padded(tokens, lengths, members)
    if strategy.form == "gram":
        return gram.gram_products(u, v, groups)
    wide = u.dtype if u.dtype == v.dtype else torch.float32
    copied = u.nbytes + v.nbytes if tokens is None else 0  # of `scratch`, what the rows side by side take already
    plan = plan_groups(wide, u.shape[1], v.shape[1], groups, budget=strategy.scratch - copied)
    return outer.outer_products(u, v, groups, weight, plan=plan)
