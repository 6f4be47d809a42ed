"""What steps do to every response, to first order: one on the whole sample, and the run's own between two checkpoints.

Letters: P pairs of the sample, B of a batch, N = 2B rows of it, chosen first; K numbers of a row's vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradent.auditing.measuring.batches import Block, memory_errors
from gradent.auditing.state.targets import Target
from gradent.hooks.passes.driver import measure_groups
from gradent.hooks.reduction.account_ledger import VectorLedger
from gradent.kernels.common.budget import DEFAULT_BUDGET
from gradent.kernels.common.numerics import accumulator
from gradent.kernels.common.sketch import GradientSketch
from gradent.kernels.common.wanted import Wanted
from gradent.loading.preferences import AuditPair, batch_of
from gradent.measurement import measure, measure_rows, weighted_gradient
from gradent.model.observed import observed
from gradent.model.parameters import input_device, trainable
from gradent.record.json_lines import digest
from gradent.record.table import Floats

__all__ = [
    "ARRIVING", "LEAVING", "SAMPLE", "StepTask", "displacement", "measure_along", "measure_vectors", "read_values",
    "sample_gradient",
]  # fmt: skip

SAMPLE, ARRIVING, LEAVING = "sample", "arriving", "leaving"
"""Directions: a step on the mean loss of the sample; from the checkpoint before to this; from this to the next."""

Values = dict[str, Tensor]
"""A tensor for every trainable parameter's name."""

Vectors = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class StepTask:
    """What is to be found of one target's steps."""

    target: Target
    weights: Floats  # `∂L/∂log π` of every pair's chosen and rejected in the sample's mean loss, `[P, 2]`
    before: Target | None  # the checkpoint before
    after: Target | None  # and the next

    @cached_property
    def identities(self) -> dict[str, str]:
        """Direction -> a digest of everything that its findings depend on."""
        found = {SAMPLE: digest([self.target.identity, self.weights.tolist()])}
        if self.before is not None:
            found[ARRIVING] = digest([self.before.identity, self.target.identity])
        if self.after is not None:
            found[LEAVING] = digest([self.target.identity, self.after.identity])
        return found


def read_values(model: nn.Module) -> Values:
    """The model's trainable parameters, on the CPU."""
    return {name: part.detach().to("cpu", copy=True) for name, part in trainable(model).items()}


def displacement(begin: Values, end: Values) -> Values | str:
    """θ at the end less θ at the begin, wide; or why the two cannot be compared."""
    names = sorted(begin.keys() ^ end.keys())
    names += [name for name in begin.keys() & end.keys() if begin[name].shape != end[name].shape]
    if names:
        return f"{names[0]!r} is not the same parameter in both"
    return {name: end[name].to(accumulator(end[name].dtype)) - begin[name] for name in begin}


def sample_gradient(
    model: nn.Module,
    pairs: Sequence[AuditPair],
    batches: Sequence[Sequence[int]],
    weights: Floats,
    *,
    engine: str = "hooks",
) -> Values:
    """The gradient of the loss over some batches, from `∂L/∂log π` of every pair's two responses, `[P, 2]`."""
    # Of no batch it is zero, for another rank's part to be added to.
    total = {name: torch.zeros_like(part, dtype=accumulator(part.dtype)) for name, part in trainable(model).items()}
    for count, positions in enumerate(batches):
        chunk = [pairs[position] for position in positions]
        with memory_errors(chunk):
            batch = batch_of(chunk)
            if not count and engine == "hooks":
                measure(model, batch.select([0]))  # learns whether rows share a forward
            part = weighted_gradient(model, batch, torch.from_numpy(weights[list(positions)].T.flatten()))
        for name, grad in part.items():
            total[name] += grad
    return total


def measure_along(
    model: nn.Module,
    pairs: Sequence[AuditPair],
    batches: Sequence[Sequence[int]],
    directions: Mapping[str, Values],
    **options: Any,
) -> Iterator[dict[str, Block]]:
    """Of every batch and direction: `⟨g_i, d⟩` of its rows, `[chosen, rejected]`, and by module their sums."""
    names = list(directions)
    for positions in batches:
        chunk = [pairs[position] for position in positions]
        with memory_errors(chunk):
            batch = batch_of(chunk)
            found = measure_rows(model, batch, "pairs", directions=list(directions.values()), **options)
        assert found.along is not None
        modules = found.modules_along or {}
        yield {
            name: {
                "positions": list(positions),
                "along": found.along[:, place].view(2, -1).tolist(),
                "modules": {module: along[:, place].view(2, -1).sum(1).tolist() for module, along in modules.items()},
            }
            for place, name in enumerate(names)
        }


def measure_vectors(
    model: nn.Module,
    pairs: Sequence[AuditPair],
    batches: Sequence[Sequence[int]],
    *,
    width: int,
    memory_budget: int | None,
) -> Iterator[tuple[Vectors, bool]]:
    """Vectors `[2, B, K]` of every batch's gradients, K at most `width`; and whether they are the gradients."""
    parameters = trainable(model)
    sketch = GradientSketch([part.shape for part in parameters.values()], width)
    wide = accumulator(*(part.dtype for part in parameters.values()))
    device, budget = input_device(model), memory_budget or DEFAULT_BUDGET

    def make_ledger(wanted: Wanted) -> VectorLedger:
        return VectorLedger(wanted.rows, sketch, dtype=wide, device=device, budget=budget)

    for count, positions in enumerate(batches):
        chunk = [pairs[position] for position in positions]
        with memory_errors(chunk):
            batch = batch_of(chunk)
            if not count:
                measure(model, batch.select([0]), memory_budget=memory_budget)  # learns whether rows share a forward
            rows = [(ids.to(device), marks.to(device)) for ids, marks in map(batch.row, range(2 * len(batch)))]
            groups = [[pair, len(batch) + pair] for pair in range(len(batch))]
            names = [pair.where for pair in (*chunk, *chunk)]
            with torch.enable_grad(), observed(model):
                outcomes = measure_groups(
                    model, parameters, rows, groups, names, make_ledger, explicit_budget=memory_budget, dropout=False
                )
        vectors = torch.zeros(len(rows), sketch.width, dtype=wide)
        for numbers, outcome in outcomes:
            vectors[numbers] = outcome.entries[0].cpu()
        yield vectors.view(2, len(batch), -1).numpy(), sketch.is_exact
