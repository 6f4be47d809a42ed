"""The account of one optimizer step: what moved each response's log-prob, to first order.

With `g_i = ∇ log π(y_i|x_i)` and `h_j` what row j gives to the loss's gradient, an optimizer's step
`Δθ = −lr [P ∘ (fresh · κ (Σ_j h_j + r) + carried · m) + decay · θ]` moves response i by `⟨g_i, Δθ⟩`, a sum over what is
in the step. κ is what clipping leaves of the gradient, r what earlier micro-batches have accumulated.

Letters: N rows of a step, in one backward or several. Of pairs these are all chosen rows, then all rejected ones.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from gradent.attribution.roles import Roles
from gradent.attribution.sketched import StepSketch, relative_rates
from gradent.attribution.update_rule import UpdateRule
from gradent.hooks.piggyback.config import RowStore, StepMetric
from gradent.hooks.piggyback.observation import BackwardObservation
from gradent.kernels.common.account import AccountLayout, AccountSums, ElementMetric, KeptEstimate
from gradent.kernels.common.numerics import accumulator
from gradent.kernels.common.wanted import Wanted

__all__ = [
    "GRADIENT",
    "StepAttribution",
    "assemble",
    "attribute_backward",
    "attribute_kept",
    "join_errors",
    "step_metric",
]


TOGETHER = 2**16
"""Elements of small parameters that are taken together."""

GRADIENT = "gradient"
"""The direction that is the whole gradient of the step."""


@dataclass(frozen=True, kw_only=True)
class StepAttribution:
    """What moved the responses of one optimizer step, to first order, by source.

    Rows are the step's N responses: of k pairs in the order of `gram`, chosen of pair 0 to k-1, then rejected; of rows
    that are no pairs in the order of `rows`. Changes are in nats: what the step adds to `log π(y_i|x_i)`.

    Attributes:
        products: `⟨g_i, P h_j⟩ / c_j`, the rows' Gram matrix in the optimizer's metric, float64 `[N, N]`. Between rows
            of different backwards (micro-batches, ranks) whose gradients had no room, they are estimates, and nan
            where there was no room for sketches either.
        pushes: what row j's part of the gradient does to row i, nats, float64 `[N, N]`; nan as in `products`.
        moved: source -> float64 `[N]`, nats: own (the row itself), partner (the other response of its pair),
            others_chosen and others_rejected (the other pairs that met it: in one backward, or in one step where the
            rows' gradients were kept or sketched). Of rows in groups instead of these: positives and negatives (the
            other rows of its group that the loss raises and lowers), other_groups. earlier_batches (what else is in
            the gradient: micro-batches before;
            where the gradients were kept, other ranks; where they were sketched, what sketches leave of micro-batches
            before; in a pass of gradent's own, all micro-batches and ranks), momentum, weight_decay. Of an optimizer
            whose step cannot be split, the one source "step": all that moved the row, along the step as it was taken;
            `products` and `pushes` are nan then.
        realised: how much each `log π(y_i|x_i)` really changed, float64 `[N]`; None unless it was measured.
        is_whole: whether all of the step's gradient is in; later micro-batches, other ranks and rows without a partner
            are not where neither the rows' gradients nor sketches of them had room.
        sketch_error: root mean square error of an estimate, as a share of the two rows' norms in the optimizer's
            metric; measured on products that are known exactly. None where nothing was sketched.
        sketch: what rows of other ranks need to meet these; None once they have, and where there are none.
        sides: 2 of pairs, 1 of rows that are no pairs.
        gram: `⟨g_i, g_j⟩`, float64 `[N, N]`, where the rows' gradients were kept and are no pairs'; else None.
        lasting: what a gradient that is the same in every step comes to in one, momentum included, over what it does
            without; None where it differs between parameters, and where the loss weighs a response's tokens
            differently, so that a push is not one of `g_j`.
    """

    products: Tensor
    pushes: Tensor
    moved: dict[str, Tensor]
    realised: Tensor | None = None
    is_whole: bool = True
    sketch_error: float | None = None
    sketch: StepSketch | None = field(default=None, repr=False, compare=False)
    sides: int = 2
    gram: Tensor | None = field(default=None, repr=False, compare=False)
    lasting: float | None = None

    @cached_property
    def total(self) -> Tensor:
        """The first-order change of each response, float64 `[N]`: the sum over sources."""
        return torch.stack(list(self.moved.values())).sum(0)

    @property
    def rest(self) -> Tensor | None:
        """What the account does not explain, float64 `[N]`: later micro-batches, other ranks, curvature."""
        return None if self.realised is None else self.realised - self.total

    @property
    def explained(self) -> float | None:
        """`1 − Σ (realised − total)² / Σ realised²` over the rows; None without `realised`, nan where nothing moved."""
        rest = self.rest
        if rest is None or self.realised is None:
            return None
        moved = float(self.realised.square().sum())
        return 1 - float(rest.square().sum()) / moved if moved > 0 else float("nan")

    def select(self, members: Sequence[int]) -> Self:
        """Some pairs, or rows that are no pairs; what the others did to them stays in `moved`."""
        half = len(self.products) // self.sides
        numbers = [member + side * half for side in range(self.sides) for member in members]
        rows = torch.tensor(numbers, dtype=torch.int64)
        return replace(
            self, products=self.products[rows][:, rows], pushes=self.pushes[rows][:, rows],
            moved={source: values[rows] for source, values in self.moved.items()},
            realised=None if self.realised is None else self.realised[rows],
            sketch=None if self.sketch is None else self.sketch.select(rows),
            gram=None if self.gram is None else self.gram[rows][:, rows],
        )  # fmt: skip

    @classmethod
    def join(cls, parts: Sequence[StepAttribution]) -> StepAttribution:
        """The rows of several micro-batches or ranks, at least one; of pairs, chosen of all of them first."""
        if len(parts) == 1:
            return parts[0]
        places = cls.places(parts)
        count = sum(map(len, places))
        products, pushes = (torch.full((count, count), float("nan"), dtype=torch.float64) for _ in range(2))
        for part, rows in zip(parts, places, strict=True):
            products[rows[:, None], rows], pushes[rows[:, None], rows] = part.products, part.pushes
        realised = [part.realised for part in parts if part.realised is not None]
        return cls(
            products=products, pushes=pushes,
            moved={source: _sides(parts, [part.moved[source] for part in parts]) for source in parts[0].moved},
            realised=_sides(parts, realised) if len(realised) == len(parts) else None,
            is_whole=all(part.is_whole for part in parts),
            sketch_error=join_errors(parts), sides=parts[0].sides, lasting=_same([part.lasting for part in parts]),
        )  # fmt: skip

    @staticmethod
    def places(parts: Sequence[StepAttribution]) -> list[Tensor]:
        """Where each part's rows are among those of all joined, int64 `[N]` of each part."""
        sides, halves = parts[0].sides, [len(part.products) // parts[0].sides for part in parts]
        count, starts = sum(halves), [sum(halves[:number]) for number in range(len(halves))]
        return [
            torch.cat([torch.arange(half) + side * count + start for side in range(sides)])
            for half, start in zip(halves, starts, strict=True)
        ]


def join_errors(parts: Sequence[StepAttribution]) -> float | None:
    """The root mean square of several accounts' `sketch_error`; None where none has one."""
    errors = [part.sketch_error**2 for part in parts if part.sketch_error is not None]
    return math.sqrt(sum(errors) / len(errors)) if errors else None


def _same(values: Sequence[float | None]) -> float | None:
    """The value that all share; None where they differ."""
    return values[0] if len(set(values)) == 1 else None


def _sides(parts: Sequence[StepAttribution], values: Sequence[Tensor]) -> Tensor:
    """Values of every part's rows; of pairs, chosen of all parts first."""
    halves = [value.view(parts[0].sides, -1) if len(value) else value.new_zeros(parts[0].sides, 0) for value in values]
    return torch.cat([half[side] for side in range(parts[0].sides) for half in halves])


def attribute_backward(
    observation: BackwardObservation, rule: UpdateRule, *, kept: float, lr: float | None = None
) -> StepAttribution | str:
    """The account of one backward's rows, or why there is none; `kept` is the part that clipping leaves."""
    if observation.no_account_reason is not None:
        return observation.no_account_reason
    sources = observation.weighted, observation.plain
    return assemble(observation.account, rule, observation.c, sources, Roles.of(observation), kept=kept, lr=lr)


def attribute_kept(
    observations: Sequence[BackwardObservation],
    parameters: Sequence[Tensor],
    rule: UpdateRule,
    *,
    kept: float,
    lr: float | None = None,
) -> StepAttribution:
    """The account of a step whose rows' gradients were kept, with the gradient that the optimizer gets."""
    metric = step_metric(rule)
    sources = (*metric.weighted, GRADIENT)
    count = observations[0].sides
    sides = [(seen, seen.side(number)) for number in range(count) for seen in observations]
    c, group = (torch.cat([part[rows] for part, rows in column]) for column in (
        [(seen.c, rows) for seen, rows in sides], [(seen.group, rows) for seen, rows in sides],
    ))  # fmt: skip
    layout = AccountLayout(
        len(c), len(sources), len(metric.plain), Wanted.all(len(c)) if count == 1 else Wanted.pairs(0)
    )
    # Parameters that the step treats alike are one to the account: of LoRA there are hundreds of small ones.
    alike: dict[Hashable, dict[int, ElementMetric]] = {}
    for number in {number: None for seen in observations for number in seen.rows_kept}:
        found, tensor = metric.metric(number), parameters[number]
        found = replace(found, weighted=[*found.weighted, tensor.grad], before=tensor.grad)
        missing = tuple(part is None for part in (found.second, *found.weighted, *found.plain))
        key = rule.terms(number, lr), found.correction, found.eps, found.growth, missing, tensor.dtype, tensor.device
        alike.setdefault(key, {})[number] = found
    blocks = {}
    for elements in alike.values():
        sums = AccountSums(layout, ElementMetric(), torch.zeros(len(c), dtype=torch.float64), KeptEstimate(1.0))
        for pack in _packs({number: parameters[number].numel() for number in elements}):
            tile = torch.cat([_rows_kept(seen, rows, pack, parameters) for seen, rows in sides])
            sums.of(ElementMetric.join([elements[number] for number in pack])).add(tile, ...)
        blocks[next(iter(elements))] = layout.split(sums.entries.cpu())
    roles = Roles.by_coefficients(count, group, c)
    account = assemble(blocks, rule, c, (sources, metric.plain), roles, kept=kept, lr=lr)
    if count == 1 and blocks:
        account = replace(
            account, gram=layout.bare.matrix(torch.stack([part["bare"] for part in blocks.values()]).sum(0))
        )
    return account


def _packs(sizes: Mapping[int, int]) -> list[list[int]]:
    """Parameters, given with their sizes, in lists of `TOGETHER` elements at most, where more than one is in a list."""
    packs: list[list[int]] = []
    used = TOGETHER
    for number, size in sizes.items():
        if used + size > TOGETHER:
            packs.append([])
            used = 0
        packs[-1].append(number)
        used += size
    return packs


def _rows_kept(seen: BackwardObservation, rows: slice, pack: Sequence[int], parameters: Sequence[Tensor]) -> Tensor:
    """Some rows' gradients of some parameters, one behind the other, `[rows, n]` wide."""
    parts = []
    for number in pack:
        kept, tensor = seen.rows_kept.get(number), parameters[number]
        size = rows.stop - rows.start, tensor.numel()
        wide = accumulator(tensor.dtype)
        parts.append(tensor.new_zeros(size, dtype=wide) if kept is None else kept[rows].reshape(size))
    return torch.cat(parts, 1)


def assemble(
    account: Mapping[int, Mapping[str, Tensor]],
    rule: UpdateRule,
    c: Tensor,
    sources: tuple[Sequence[str], Sequence[str]],
    roles: Roles,
    *,
    kept: float,
    lr: float | None = None,
    weighted_rows: int = 0,
) -> StepAttribution:
    """The account of N rows with coefficients `[N]` from the blocks of every parameter and the directions' sources."""
    # With `weighted_rows` N, N more rows follow the first: `h_j` as the loss weighs their tokens. "gradient" is the
    # step's whole gradient, and what these rows do not account for of it is earlier micro-batches'.
    rows, is_whole = len(c), GRADIENT in sources[0]
    ends = slice(weighted_rows, weighted_rows + rows)  # the rows that push
    products, fresh = (torch.zeros(rows, rows, dtype=torch.float64) for _ in range(2))
    moved = {source: torch.zeros(rows, dtype=torch.float64) for source in (*roles.sources, GRADIENT)}
    lasting: list[float | None] = []
    for number, blocks in account.items():
        terms = rule.terms(number, lr)
        lasting.append(terms.lasting)
        # Where an element had no preconditioner, the step moves it by `limit`, whatever the size of the gradient: the
        # optimizer's, where that is there, else the backward's.
        gradient, limit = terms.fresh * kept, terms.limit * (kept if is_whole else 1.0)
        plain_part, fresh_part = blocks["products"][:rows, ends], blocks["fresh"][:rows, ends]
        products += plain_part + (fresh_part * (limit / gradient) if gradient else 0.0)
        fresh -= terms.lr * (gradient * plain_part + limit * fresh_part)
        factors = {
            "momentum": terms.carried, "weight_decay": terms.decay, "earlier_batches": gradient, GRADIENT: terms.fresh,
        }  # fmt: skip
        for names, block in zip(sources, (blocks["along"], blocks["plain"]), strict=True):
            for source, along in zip(names, block, strict=True):
                moved[source] -= terms.lr * factors[source] * along[:rows]
        moved[GRADIENT if is_whole else "earlier_batches"] -= terms.lr * terms.limit * blocks["fresh"][-1, :rows]
    pushes = fresh if weighted_rows else fresh * c
    moved |= roles.split(pushes)
    if is_whole:
        moved["earlier_batches"] = moved[GRADIENT] - pushes.sum(1)
    return StepAttribution(
        products=products / c if weighted_rows else products, pushes=pushes,
        moved={source: moved[source] for source in roles.sources}, sides=roles.sides,
        lasting=None if weighted_rows else _same(lasting),
    )  # fmt: skip


def step_metric(rule: UpdateRule, *, store: RowStore | None = None) -> StepMetric:
    """What the account takes of an optimizer; `store` is the room for what is kept of rows until the step."""
    decay = "weight_decay" if rule.has_decay else None
    weighted = [*(["momentum"] if rule.has_momentum else []), *([decay] if decay and not rule.is_decoupled else [])]
    plain = [decay] if decay and rule.is_decoupled else []

    def metric(number: int) -> ElementMetric:
        found = rule.elements(number)
        directions = {"momentum": rule.momentum(number), "weight_decay": rule.values(number)}
        return replace(
            found, weighted=[directions[name] for name in weighted], plain=[directions[name] for name in plain]
        )

    return StepMetric(
        metric=metric, weighted=weighted, plain=plain, store=store or RowStore(0), seed=lambda: rule.step,
        rates=lambda: relative_rates(rule),
    )  # fmt: skip
