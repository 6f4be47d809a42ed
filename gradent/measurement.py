"""Gram entries of the chosen and rejected gradients, by a forward and a backward of gradent's own: `measure`.

Letters: B pairs of the batch, k pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from gradent.errors import InputError, NonFiniteError, UncoveredParameterError
from gradent.hooks.passes.batching import group_rows
from gradent.hooks.passes.driver import measure_pairs
from gradent.hooks.passes.func_engine import per_sample_pairs
from gradent.hooks.passes.microbatch import Outcome
from gradent.kernels.common.cost import parse_budget
from gradent.model.calls import forward_marked
from gradent.model.facts import ignores_padding, trims
from gradent.model.logprobs import sequence_logprobs
from gradent.model.observed import observed
from gradent.model.parameters import check_ids, input_device, trainable, unwrap_compiled
from gradent.model.preconditioner import metric_roots
from gradent.pair_gram import ModuleGram, PairGram, on_cpu, sum_parameters
from gradent.pairs.batch import PairBatch

__all__ = ["measure", "sequence_logps"]

Row = tuple[Tensor, Tensor]


def measure(
    model: nn.Module,
    batch: PairBatch,
    *,
    engine: Literal["hooks", "func"] = "hooks",
    by_module: bool = False,
    memory_budget: int | str | None = None,
    metric: torch.optim.Optimizer | None = None,
    allow_uncovered: bool = False,
    dropout: bool = False,
) -> PairGram:
    """Measure `‖g_w‖²`, `‖g_l‖²` and `⟨g_w, g_l⟩` of every pair over the model's trainable parameters.

    `g_w = ∇_θ log π(y_w|x)` and `g_l = ∇_θ log π(y_l|x)`, log-probs summed over completion tokens: the quantities of
    the paper's equations (4), (5) and Condition 1. The model is left as it was: parameters, `.grad`, training mode,
    random state and `requires_grad`.

    Args:
        model: a causal language model: transformers, PEFT, or any module that maps `input_ids` to logits.
        batch: B preference pairs, on any device.
        engine: "hooks" (batched forward, pruned backward, layers reduced as they arrive: fast, small) or "func"
            (`torch.func` per-sample gradients of the whole model, two rows at a time: slow, a second opinion).
        by_module: also return each module's share.
        memory_budget: bytes, or a string such as "512MiB", that the reductions' scratch may take; None for 256 MiB
            of tiles and no limit on explicit gradients. Captured activations and the model's own memory come on top.
        metric: None for the Euclidean inner product; an Adam or AdamW optimizer for `Σ a_k b_k P_k` with its
            preconditioner `P = 1 / (√v̂ + ε)` at this step.
        allow_uncovered: go on where a parameter cannot be measured, and report it in `coverage` and `uncovered`.
        dropout: keep dropout on while measuring.

    Returns:
        The `PairGram` of the B pairs, float64 on the CPU.

    Raises:
        InputError: an unknown engine or metric, or token ids outside the model's vocabulary.
        ModelError: nothing trainable, not a causal language model, or no logits.
        UncoveredParameterError: a parameter cannot be measured within `memory_budget`.
        NonFiniteError: a nan or inf in the logits or in a gradient, with the layer where it first appeared.
        MemoryBudgetError: the budget is malformed, or smaller than one row of a tile.

    Example:
        >>> gram = measure(model, batch)  # doctest: +SKIP
        >>> gram.cosine  # doctest: +SKIP
    """
    if engine not in ("hooks", "func"):
        raise InputError(f"engine={engine!r} is unknown; accepted are 'hooks' (the default) and 'func'.")
    model = unwrap_compiled(model)
    parameters = trainable(model)
    budget = parse_budget(memory_budget)
    weight = None if metric is None else metric_roots(metric, parameters)
    rows = _rows(model, batch)
    with torch.enable_grad(), observed(model, dropout=dropout):
        if engine == "hooks":
            outcomes = measure_pairs(model, parameters, rows, budget=budget, weight=weight, dropout=dropout)
        else:
            outcomes = per_sample_pairs(model, parameters, rows, weight=weight, dropout=dropout)
    outcomes = [(pairs, replace(outcome, entries=on_cpu(outcome.entries))) for pairs, outcome in outcomes]
    _check_finite(list(parameters), outcomes)
    return _gather(batch, parameters, outcomes, by_module=by_module, allow_uncovered=allow_uncovered)


@torch.no_grad()
def sequence_logps(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Summed completion log-probs without gradients: what a reference model contributes to a loss.

    Args:
        model: a causal language model.
        batch: B preference pairs.

    Returns:
        `(chosen, rejected)`, each float64 `[B]` on the CPU, in nats.

    Raises:
        InputError: token ids outside the model's vocabulary.
        ModelError: the model returns no logits.
    """
    model = unwrap_compiled(model)
    rows = _rows(model, batch)
    result = torch.zeros(len(rows), dtype=torch.float64)
    with observed(model):
        lengths = [len(ids) for ids, _ in rows]
        padded, trim = ignores_padding(model, rows[0][0]), trims(model, rows[0][0])
        for group in group_rows(lengths, rows[0][0].device) if padded else [[row] for row in range(len(rows))]:
            longest = max(lengths[row] for row in group)
            parts = [[nn.functional.pad(part, (0, longest - len(part))) for part in rows[row]] for row in group]
            ids, marks = (torch.stack(column) for column in zip(*parts, strict=True))
            result[group] = sequence_logprobs(*forward_marked(model, ids, marks, trim=trim)).cpu()
    return result[: len(batch)], result[len(batch) :]


def _rows(model: nn.Module, batch: PairBatch) -> list[Row]:
    """The 2B rows without padding, on the model's device."""
    device = input_device(model)
    rows = [batch.row(index) for index in range(2 * len(batch))]
    check_ids(model, torch.cat([ids for ids, _ in rows]))
    return [(ids.to(device), marks.to(device)) for ids, marks in rows]


def _check_finite(names: Sequence[str], outcomes: Sequence[tuple[list[int], Outcome]]) -> None:
    for pairs, outcome in outcomes:
        if not outcome.entries or bool(torch.stack(list(outcome.entries.values())).isfinite().all()):
            continue
        for number, entry in outcome.entries.items():  # in the order of the backward pass
            bad = (~torch.isfinite(entry)).any(1).nonzero()
            if len(bad):
                raise NonFiniteError(
                    f"non-finite gradient: pair {pairs[int(bad[0])]} has a nan or inf in the gradient of "
                    f"{names[number]!r} (first in the backward pass), or its square overflows. Check the layers after "
                    "it; try a wider dtype (bfloat16 or float32 instead of float16), or check the checkpoint for nan."
                )


def _gather(
    batch: PairBatch,
    parameters: dict[str, nn.Parameter],
    outcomes: Sequence[tuple[list[int], Outcome]],
    *,
    by_module: bool,
    allow_uncovered: bool,
) -> PairGram:
    """The `PairGram` of what the engine returned for groups of pairs."""
    names, count = list(parameters), len(batch)
    uncovered = {names[number]: why for _, outcome in outcomes for number, why in outcome.uncovered.items()}
    total = sum(parameter.numel() for parameter in parameters.values())
    coverage = 1 - sum(parameters[name].numel() for name in uncovered) / total
    if uncovered and not allow_uncovered:
        listed = "".join(f"\n  - {name}: {why}" for name, why in uncovered.items())
        raise UncoveredParameterError(
            f"{len(uncovered)} trainable parameters ({1 - coverage:.1%} of the elements) cannot be measured:{listed}\n"
            "Raise memory_budget, freeze them (requires_grad=False), or pass allow_uncovered=True to go on without "
            "them: coverage then reports the share."
        )
    logps = torch.zeros(2 * count, dtype=torch.float64)
    for pairs, outcome in outcomes:
        logps[pairs] = outcome.logps[: len(pairs)]
        logps[[count + pair for pair in pairs]] = outcome.logps[len(pairs) :]
    modules = sum_parameters(names, [(pairs, outcome.entries) for pairs, outcome in outcomes], count)
    totals = sum(modules.values(), torch.zeros(3, count, dtype=torch.float64))
    shares: dict[str, ModuleGram] = {name: (entry[0], entry[1], entry[2]) for name, entry in modules.items()}
    return PairGram(
        chosen_sq=totals[0],
        rejected_sq=totals[1],
        inner=totals[2],
        chosen_logp=logps[:count],
        rejected_logp=logps[count:],
        chosen_len=batch.chosen_len.cpu(),
        rejected_len=batch.rejected_len.cpu(),
        coverage=coverage,
        modules=shares if by_module else None,
        uncovered=uncovered,
    )
