"""The account of a step by a forward and a backward of gradent's own, once the optimizer's gradient is there.

It takes P of the step itself, and the whole gradient of the step is one of its directions: what earlier and later
micro-batches and other ranks gave to it is in. A row whose tokens the loss weighs differently goes through the model
twice: for `g_i`, and for `h_i = Σ_t w_{i,t} ∇ log π(y_t)`.

Letters: N rows; of pairs, the first half is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gradent.attribution.roles import Roles
from gradent.attribution.step import GRADIENT, StepAttribution, assemble, step_metric
from gradent.attribution.update_rule import UpdateRule
from gradent.hooks.passes.driver import measure_groups
from gradent.hooks.reduction.account_ledger import AccountLedger
from gradent.kernels.common.account import AccountLayout, ElementMetric
from gradent.kernels.common.wanted import Wanted
from gradent.model.calls import tempered
from gradent.model.observed import observed
from gradent.model.parameters import input_device
from gradent.pair_gram import on_cpu

__all__ = ["attribute_rows"]

Row = tuple[Tensor, Tensor]
"""`(ids int64 [T], marks bool or weights [T])`."""


def attribute_rows(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    c: Tensor,
    rule: UpdateRule,
    roles: Roles,
    *,
    kept: float,
    lr: float | None,
    budget: int,
    weights: Sequence[Tensor] | None = None,
    temperature: float = 1.0,
) -> StepAttribution:
    """The account of N rows with coefficients `[N]`, or token weights `[T]` each; the model was measured before."""
    count = len(rows)
    doubled = [*rows, *((ids, weight) for (ids, _), weight in zip(rows, weights or (), strict=False))]
    metric, tensors = step_metric(rule), list(parameters.values())
    sources = (*metric.weighted, GRADIENT)
    layout = AccountLayout(len(doubled), len(sources), len(metric.plain))

    def elements(number: int) -> ElementMetric:
        found = metric.metric(number)
        return ElementMetric(
            second=found.second, correction=found.correction, eps=found.eps,
            weighted=[*found.weighted, tensors[number].grad], plain=found.plain,
        )  # fmt: skip

    def make_ledger(wanted: Wanted) -> AccountLedger:
        return AccountLedger(layout, elements, torch.zeros(layout.rows, dtype=torch.float64), budget=budget)

    device = input_device(model)
    moved_rows = [(ids.to(device), marks.to(device)) for ids, marks in doubled]
    names = [f"row {row}" for row in range(len(doubled))]
    with torch.enable_grad(), observed(model), tempered(temperature):
        ((_, outcome),) = measure_groups(
            model, parameters, moved_rows, [range(len(doubled))], names, make_ledger,
            explicit_budget=None, dropout=False,
        )  # fmt: skip
    blocks = {number: layout.split(entry) for number, entry in on_cpu(outcome.entries).items()}
    return assemble(
        blocks, rule, c, (sources, metric.plain), roles, kept=kept, lr=lr,
        weighted_rows=count if weights is not None else 0,
    )  # fmt: skip
