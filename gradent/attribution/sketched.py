"""What rows of a step are to rows of its other backwards and ranks, estimated from sketches of their gradients.

A row's sketch is of `√(r P) ∘ g`, r being the rate `lr · fresh` of each parameter's group over the largest of all: the
product of two sketches times `c_j` is what row j pushes row i by, up to one factor. Elements that had no preconditioner
before the step have no part in a sketch.

Letters: N rows of a backward or of a rank's whole step, of pairs chosen first, n of them in its account; K numbers of a
sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from gradent.attribution.roles import Roles
from gradent.attribution.update_rule import UpdateRule
from gradent.hooks.piggyback.observation import BackwardObservation
from gradent.kernels.common.numerics import dots
from gradent.kernels.common.sketch import folded

__all__ = ["StepSketch", "relative_rates"]

SAME = 1e-6
"""Most by which the rates of a step may differ from those that its sketches were made with, relative."""


def relative_rates(rule: UpdateRule) -> list[float] | None:
    """Every parameter's `lr · |fresh|` over the largest, by number; None where signs differ or no gradient counts."""
    rates = _rates(rule, None)
    if rates is not None and not max(rates):  # a warm-up's first step: the learning rates may come yet
        rates = _rates(rule, 1.0)
    return None if rates is None or not max(rates) else [rate / max(rates) for rate in rates]


def _rates(rule: UpdateRule, lr: float | None) -> list[float] | None:
    """Every parameter's `lr · |fresh|`, by number; None where the signs differ."""
    terms = [rule.terms(number, lr) for number in range(rule.count)]
    return [term.lr * abs(term.fresh) for term in terms] if len({term.fresh > 0 for term in terms}) == 1 else None


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSketch:
    """Sketches of the rows of a backward, or of a rank's whole step, with what turns their products into pushes."""

    vectors: Tensor  # float32 [N, K]
    seed: int  # sketches of one seed belong together
    c: Tensor  # float64 [N]
    roles: Roles  # of the N rows
    roots: Tensor  # float64 [N], of each row's share of r in `⟨g, r P g⟩`
    push: float  # times c_j and the product of two sketches: what row j moves row i by, nats
    rows: Tensor  # int64 [n], which of the N are in the account
    squared_error: float  # sum of the squared errors of products that are known exactly, over the rows' norms; as 1/K
    compared: int  # and how many these are
    has_all: bool  # no row of these backwards is missing
    ranks: int  # that take part in the step

    @classmethod
    def of(
        cls, observation: BackwardObservation, rule: UpdateRule, *, kept: float, lr: float | None, ranks: int
    ) -> StepSketch | str:
        """The sketches of one backward's rows, or why the step to come cannot be told from them."""
        assert observation.sketches is not None
        rates, push = observation.rates, _find_push(rule, observation.rates, lr)
        if isinstance(push, str):
            return push
        rows = len(observation.c)
        exact, bare = (torch.zeros(rows, rows, dtype=torch.float64) for _ in range(2))
        for number, blocks in observation.account.items():
            exact += blocks["products"] * rates[number]
            bare += blocks["products"]
        norms, shares = exact.diagonal().sqrt(), exact.diagonal() / bare.diagonal()
        scale = norms[:, None] * norms
        error = (dots(observation.sketches, observation.sketches) - exact) / scale
        errors = error[(scale > 0) & torch.ones_like(scale, dtype=torch.bool).triu(1)]
        return cls(
            vectors=observation.sketches, seed=observation.seed, c=observation.c, push=push * kept,
            roles=Roles.of(observation),
            roots=torch.where(shares > 0, shares, 1.0).sqrt(), rows=torch.arange(rows),
            squared_error=float(errors.square().sum()), compared=len(errors),
            has_all=not observation.unpaired, ranks=ranks,
        )  # fmt: skip

    @classmethod
    def join(cls, parts: Sequence[StepSketch]) -> StepSketch:
        """The rows of several backwards of one rank, in sketches of the least width; of pairs, chosen of all first."""
        width, counts = min(part.vectors.shape[1] for part in parts), [len(part.c) for part in parts]
        sides = parts[0].roles.sides
        halves = [slice(side * n // sides, (side + 1) * n // sides) for side in range(sides) for n in counts]
        both = list(zip([*parts] * sides, halves, strict=True))
        c, group = (torch.cat([values[half] for values, half in column]) for column in (
            [(part.c, half) for part, half in both], [(part.roles.group, half) for part, half in both],
        ))  # fmt: skip
        return replace(
            parts[0], vectors=torch.cat([folded(part.vectors[half], width) for part, half in both]),
            c=c, roles=Roles.by_coefficients(sides, group, c), rows=torch.arange(sum(counts)),
            roots=torch.cat([part.roots[half] for part, half in both]),
            squared_error=sum(part.squared_error * part.vectors.shape[1] / width for part in parts),
            compared=sum(part.compared for part in parts),
            has_all=all(part.has_all for part in parts),
        )  # fmt: skip

    def select(self, rows: Tensor) -> Self:
        """The same, where the account has only some of its rows."""
        return replace(self, rows=self.rows[rows])

    def split(self, pushed: Tensor, other: StepSketch) -> dict[str, Tensor]:
        """Pushes `[n, M]` of this account's rows by all of another, by source `[n]`."""
        mine = replace(self.roles, group=self.roles.group[self.rows], is_positive=self.roles.is_positive[self.rows])
        return mine.split(pushed, other.roles)

    def meet(self, other: StepSketch) -> tuple[Tensor, Tensor]:
        """Of this account's rows with all M of another, float64 `[n, M]` each: `⟨g_i, P g_j⟩`, and pushes in nats."""
        width = min(self.vectors.shape[1], other.vectors.shape[1])
        gram = dots(folded(self.vectors[self.rows], width), folded(other.vectors, width))
        return gram / (self.roots[self.rows, None] * other.roots), self.push * gram * other.c


def _find_push(rule: UpdateRule, rates: Tensor, lr: float | None) -> float | str:
    """What turns products of sketches with these rates into those of the step to come, times −1."""
    now = _rates(rule, lr)
    if now is None:
        return "parameters are moved along their gradients and against them"
    found = torch.tensor(now, dtype=torch.float64)
    factor = float(found.max() / rates[found.argmax()]) if float(found.max()) else 0.0
    if not bool(((found - factor * rates).abs() <= SAME * found.max()).all()):
        return "learning rates have changed since the backward, and not by one factor for all"
    return -factor if rule.terms(0, lr).fresh > 0 else factor
