"""Inner products between responses' gradients, by a forward and a backward of gradent's own: `measure`, `measure_rows`.

Letters: B pairs, N rows of the batch, M entries of a micro-batch, D directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from gradent.errors import InputError, NonFiniteError, UncoveredParameterError
from gradent.hooks.passes.driver import RowsOutcome, measure_groups
from gradent.hooks.passes.func_engine import per_sample_rows
from gradent.hooks.passes.microbatch import Row, group_rows
from gradent.hooks.reduction.ledger import Ledger
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.kernels.common.numerics import accumulator
from gradent.kernels.common.wanted import Wanted
from gradent.model.autograd import row_gradients
from gradent.model.calls import forward_marked, tempered
from gradent.model.facts import facts, ignores_padding, trims
from gradent.model.logprobs import sequence_logprobs
from gradent.model.observed import observed
from gradent.model.parameters import check_ids, input_device, trainable, unwrap_compiled
from gradent.model.preconditioner import metric_roots
from gradent.pair_gram import ModuleGram, PairGram, on_cpu, sum_modules, sum_parameters
from gradent.pairs.batch import PairBatch, not_a_batch
from gradent.pairs.row_batch import RowBatch
from gradent.row_gram import RowGram

__all__ = ["measure", "measure_rows", "measure_weighted", "row_logps", "sequence_logps", "weighted_gradient"]

Engine = Literal["hooks", "func"]


def measure(
    model: nn.Module,
    batch: PairBatch,
    *,
    engine: Engine = "hooks",
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
        InputError: `model` is no module or `batch` no `PairBatch`, an unknown engine or metric, or token ids outside
            the model's vocabulary.
        ModelError: nothing trainable, not a causal language model, or no logits.
        UncoveredParameterError: a parameter cannot be measured within `memory_budget`.
        NonFiniteError: a nan or inf in the logits or in a gradient, with the layer where it first appeared.
        MemoryBudgetError: the budget is malformed, or smaller than one row of a tile.

    Example:
        >>> gram = measure(model, batch)  # doctest: +SKIP
        >>> gram.cosine  # doctest: +SKIP
    """
    if not isinstance(batch, PairBatch):
        raise InputError(not_a_batch("measure", batch, "PairBatch"))
    model = unwrap_compiled(model)
    parameters = trainable(model)
    count = len(batch)
    names = [f"pair {row % count}, {'chosen' if row < count else 'rejected'}" for row in range(2 * count)]
    outcomes = _measure(
        model,
        parameters,
        _rows(model, batch),
        [(pair, count + pair) for pair in range(count)],
        names,
        engine=engine,
        memory_budget=memory_budget,
        metric=metric,
        dropout=dropout,
    )
    coverage, uncovered = _coverage(parameters, outcomes, allow_uncovered=allow_uncovered)
    gram = _pair_gram(parameters, batch, outcomes, [0, 1, 2], by_module=by_module)
    return replace(gram, coverage=coverage, uncovered=uncovered)


def measure_weighted(
    model: nn.Module,
    batch: PairBatch,
    weights: Sequence[Tensor],
    *,
    by_module: bool = False,
    memory_budget: int | str | None = None,
    metric: torch.optim.Optimizer | None = None,
) -> tuple[PairGram, Tensor]:
    """`measure`, and what a loss that weighs tokens differently has of each pair's gradient along both responses.

    Four rows of each pair go through the model: `g_w`, `g_l`, and `h_w`, `h_l` with `h_j = Σ_t w_{j,t} ∇ log π(y_j^t)`
    over all tokens of row j that the loss weighs, those of the prompt included.

    Args:
        model: a causal language model, as in `measure`.
        batch: B preference pairs, on any device.
        weights: of each of the 2B rows, chosen first, the weight of every token (padding left out), float64 `[T]`, not
            all zero; a row's first token has no log-prob and no weight.
        by_module: also return each module's share of the entries.
        memory_budget: as in `measure`.
        metric: as in `measure`.

    Returns:
        The `PairGram` of the B pairs, and `⟨g_w, h_w + h_l⟩` and `⟨g_l, h_w + h_l⟩`, float64 `[2, B]` on the CPU.

    Raises:
        GradentError: what `measure` raises.

    Example:
        >>> gram, along = measure_weighted(model, batch, weights)  # doctest: +SKIP
        >>> chosen_change, rejected_change = -along  # doctest: +SKIP
    """
    model = unwrap_compiled(model)
    parameters = trainable(model)
    count, rows = len(batch), _rows(model, batch)
    # A loss's weights can be so small that products underflow, so the rows go in with a largest weight of 1.
    scales = torch.stack([weight.abs().max() for weight in weights]).cpu().view(2, -1)
    weighed = [(weight / weight.abs().max()).to(ids.device) for (ids, _), weight in zip(rows, weights, strict=True)]
    rows += [(ids, weight) for (ids, _), weight in zip(rows, weighed, strict=True)]
    names = [f"pair {row % count}, {'chosen' if row // count % 2 == 0 else 'rejected'}" for row in range(4 * count)]
    outcomes = _measure(
        model,
        parameters,
        rows,
        [range(pair, 4 * count, count) for pair in range(count)],
        names,
        engine="hooks",
        memory_budget=memory_budget,
        metric=metric,
    )
    _coverage(parameters, outcomes, allow_uncovered=False)
    along = torch.zeros(2, count, 2, dtype=torch.float64)  # of g_w and g_l with h_w and h_l
    for numbers, outcome in outcomes:
        for entry in outcome.entries.values():
            along[:, numbers[: len(numbers) // 4]] += entry.view(-1, 2, 5)[:, 1, :4].view(-1, 2, 2).transpose(0, 1)
    gram = _pair_gram(parameters, batch, outcomes, [0, 1, 4], by_module=by_module)
    return gram, (along * scales.T).sum(2)


def _pair_gram(
    parameters: Mapping[str, Tensor],
    batch: PairBatch,
    outcomes: Sequence[RowsOutcome],
    places: Sequence[int],
    *,
    by_module: bool,
) -> PairGram:
    """The gram of pairs whose rows lead each group; `places` are those of its three entries among a group's."""
    count = len(batch)
    parts = []
    for numbers, outcome in outcomes:
        groups = len(outcome.wanted.groups)
        entries = {number: entry.view(groups, -1)[:, places] for number, entry in outcome.entries.items()}
        parts.append((numbers[:groups], entries))
    modules = sum_parameters(list(parameters), parts, count)
    totals = sum(modules.values(), torch.zeros(3, count, dtype=torch.float64))
    shares: dict[str, ModuleGram] = {name: (entry[0], entry[1], entry[2]) for name, entry in modules.items()}
    logps = _logps(outcomes, sum(len(numbers) for numbers, _ in outcomes))
    return PairGram(
        chosen_sq=totals[0],
        rejected_sq=totals[1],
        inner=totals[2],
        chosen_logp=logps[:count],
        rejected_logp=logps[count : 2 * count],
        chosen_len=batch.chosen_len.cpu(),
        rejected_len=batch.rejected_len.cpu(),
        modules=shares if by_module else None,
    )


def measure_rows(
    model: nn.Module,
    batch: RowBatch | PairBatch,
    among: Literal["pairs", "groups", "all"] = "groups",
    metric: torch.optim.Optimizer | None = None,
    *,
    engine: Engine = "hooks",
    by_module: bool = False,
    memory_budget: int | str | None = None,
    directions: Sequence[Mapping[str, Tensor]] | None = None,
    allow_uncovered: bool = False,
) -> RowGram:
    """Measure `⟨g_i, g_j⟩` between the gradients of a batch's responses, `g_i = ∇_θ log π(y_i|x_i)`.

    `measure` is the case of pairs. The model is left as it was, as there. Rows whose products are wanted meet in
    one backward pass: "all" holds the activations of the whole batch at once, the others those of a group at least.

    Args:
        model: a causal language model, as in `measure`.
        batch: N responses in groups, or pairs, which are groups of two.
        among: which products: of the two rows of each "pairs", of all rows of each of the "groups", or of "all" rows.
        metric: None for the Euclidean inner product, or an Adam or AdamW optimizer, as in `measure`.
        engine: "hooks" or "func", as in `measure`; "func" holds a gradient of the whole model for each row of a group.
        by_module: also return each module's share.
        memory_budget: as in `measure`.
        directions: D directions, each a tensor for every trainable parameter's name, of its shape: `along` of the
            result is then each row's inner product with them (a step, a momentum), in the same metric.
        allow_uncovered: as in `measure`.

    Returns:
        The `RowGram` of the N rows, float64 on the CPU.

    Raises:
        InputError: "pairs" where a group has not two rows, an unknown value of an argument, directions that do not fit
            the parameters, or token ids outside the model's vocabulary.
        ModelError: nothing trainable, not a causal language model, or no logits.
        UncoveredParameterError: a parameter cannot be measured within `memory_budget`.
        NonFiniteError: a nan or inf in the logits or in a gradient, with the layer where it first appeared.
        MemoryBudgetError: the budget is malformed, or smaller than one row of a tile.

    Example:
        >>> batch = RowBatch.from_tokens([([1, 2], [[3], [4, 5], [6]])])
        >>> measure_rows(model, batch).products.shape  # doctest: +SKIP
        torch.Size([3, 3])
    """
    if not isinstance(batch, (PairBatch, RowBatch)):
        raise InputError(not_a_batch("measure_rows", batch, "RowBatch or PairBatch"))
    model = unwrap_compiled(model)
    parameters = trainable(model)
    is_paired = isinstance(batch, PairBatch)
    count = 2 * len(batch) if is_paired else len(batch)
    group = torch.arange(count) % len(batch) if isinstance(batch, PairBatch) else batch.group.cpu()
    names = [f"row {row} (group {number})" for row, number in enumerate(group.tolist())]
    outcomes = _measure(
        model,
        parameters,
        _rows(model, batch),
        _groups(group, among),
        names,
        engine=engine,
        memory_budget=memory_budget,
        metric=metric,
        directions=directions,
    )
    coverage, uncovered = _coverage(parameters, outcomes, allow_uncovered=allow_uncovered)
    products = torch.full((count, count), float("nan"), dtype=torch.float64)
    along = None if directions is None else torch.zeros(count, len(directions), dtype=torch.float64)
    modules: dict[str, Tensor] = {}
    modules_along: dict[str, Tensor] = {}
    for numbers, outcome in outcomes:
        at, entries = torch.tensor(numbers), len(outcome.wanted.places[0])
        place = at[:, None], at[None]
        shares = sum_modules(list(parameters), outcome.entries, entries)
        total = sum(shares.values(), torch.zeros(entries, dtype=torch.float64))
        products[place] = _filled(products[place], outcome.wanted.matrix(total))
        if along is not None:
            along[at] = outcome.wanted.along(total)
        for name, share in shares.items() if by_module else ():
            matrix = modules.setdefault(name, torch.full_like(products, float("nan")))
            matrix[place] = _filled(matrix[place], outcome.wanted.matrix(share))
            if along is not None:
                modules_along.setdefault(name, torch.zeros_like(along))[at] = outcome.wanted.along(share)
    return RowGram(
        products=products,
        logp=_logps(outcomes, count),
        length=batch.completion_mask.sum(1).cpu(),
        group=group,
        along=along,
        coverage=coverage,
        modules=modules if by_module else None,
        modules_along=modules_along if by_module and along is not None else None,
        uncovered=uncovered,
    )


def sequence_logps(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Summed completion log-probs `(chosen, rejected)`, float64 `[B]` on the CPU, as of a loss's reference model."""
    result = row_logps(model, batch)
    return result[: len(batch)], result[len(batch) :]


@torch.no_grad()
def row_logps(model: nn.Module, batch: PairBatch | RowBatch, *, temperature: float = 1.0) -> Tensor:
    """Summed completion log-probs of all rows, of logits over a temperature, float64 `[N]` on the CPU."""
    model = unwrap_compiled(model)
    rows = _rows(model, batch)
    result = torch.zeros(len(rows), dtype=torch.float64)
    with observed(model), tempered(temperature):
        for group, logps in _forwards(model, rows):
            result[group] = logps.cpu()
    return result


def weighted_gradient(model: nn.Module, batch: PairBatch, weights: Tensor) -> dict[str, Tensor]:
    """`Σ_i w_i ∇ log π(y_i|x_i)` of the 2B rows, wide, by parameter: a loss's gradient with `w_i = ∂L/∂log π(y_i)`."""
    model = unwrap_compiled(model)
    parameters = trainable(model)
    total = {name: torch.zeros_like(part, dtype=accumulator(part.dtype)) for name, part in parameters.items()}
    # A loss's weights can be so small that half precision loses its gradient: they go in of size 1, by a power of two.
    exponent = math.frexp(float(weights.abs().max()))[1]
    scaled = torch.ldexp(weights, torch.tensor(-exponent))
    with torch.enable_grad(), observed(model):
        known = facts(model).batching  # what a measurement before has found of gradients, not of log-probs alone
        is_shared = known is not None and known.is_shared
        for group, logps in _forwards(model, _rows(model, batch), is_shared=is_shared):
            grads = row_gradients((logps * scaled[group].to(logps)).sum(), list(parameters.values()))
            for part, grad in zip(total.values(), grads, strict=True):
                if grad is not None:
                    part.add_(grad, alpha=2.0**exponent)
    return total


def _forwards(model: nn.Module, rows: Sequence[Row], *, is_shared: bool = True) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and log-probs of the rows of each forward, batched where the model ignores padding."""
    lengths = [len(ids) for ids, _ in rows]
    padded, trim = is_shared and ignores_padding(model, rows[0][0]), trims(model, rows[0][0])
    for group in group_rows(lengths, rows[0][0].device) if padded else [[row] for row in range(len(rows))]:
        longest = max(lengths[row] for row in group)
        parts = [[nn.functional.pad(part, (0, longest - len(part))) for part in rows[row]] for row in group]
        ids, marks = (torch.stack(column) for column in zip(*parts, strict=True))
        yield group, sequence_logprobs(*forward_marked(model, ids, marks, trim=trim))


def _rows(model: nn.Module, batch: PairBatch | RowBatch) -> list[Row]:
    """All rows without padding, on the model's device."""
    device = input_device(model)
    rows = [batch.row(index) for index in range(len(batch.input_ids))]
    check_ids(model, torch.cat([ids for ids, _ in rows]))
    return [(ids.to(device), marks.to(device)) for ids, marks in rows]


def _groups(group: Tensor, among: str) -> list[list[int]]:
    """Rows whose products are wanted, from the group of each row int64 `[N]`."""
    if among not in ("pairs", "groups", "all"):
        raise InputError(f"among={among!r} is unknown; accepted are 'pairs', 'groups' and 'all'.")
    if among == "all":
        return [list(range(len(group)))]
    members: dict[int, list[int]] = {}
    for row, number in enumerate(group.tolist()):
        members.setdefault(number, []).append(row)
    odd = {number: len(rows) for number, rows in members.items() if len(rows) != 2}
    if among == "pairs" and odd:
        number, size = next(iter(odd.items()))
        raise InputError(
            f"among='pairs' needs groups of exactly two rows; group {number} has {size}. Use among='groups' for all "
            "products within groups of any size, or among='all'."
        )
    return list(members.values())


def _measure(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    rows: Sequence[Row],
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    *,
    engine: str,
    memory_budget: int | str | None,
    metric: torch.optim.Optimizer | None,
    directions: Sequence[Mapping[str, Tensor]] | None = None,
    dropout: bool = False,
) -> list[RowsOutcome]:
    """All products among the rows of each group, on the CPU: `(row numbers, outcome)` of each micro-batch."""
    if engine not in ("hooks", "func"):
        raise InputError(f"engine={engine!r} is unknown; accepted are 'hooks' (the default) and 'func'.")
    budget = parse_budget(memory_budget)
    weight = None if metric is None else metric_roots(metric, parameters)
    along = None if not directions else _stacked(directions, parameters)

    def make_ledger(wanted: Wanted) -> Ledger:
        wanted = replace(wanted, directions=len(directions or ()))
        return Ledger(wanted, budget=budget or DEFAULT_BUDGET, weight=weight, directions=along)

    with torch.enable_grad(), observed(model, dropout=dropout):
        if engine == "hooks":
            outcomes = measure_groups(
                model, parameters, rows, groups, names, make_ledger, explicit_budget=budget, dropout=dropout
            )
        else:
            outcomes = per_sample_rows(model, parameters, rows, groups, names, make_ledger, dropout=dropout)
    outcomes = [(numbers, replace(outcome, entries=on_cpu(outcome.entries))) for numbers, outcome in outcomes]
    _check_finite(list(parameters), names, outcomes)
    return outcomes


def _stacked(directions: Sequence[Mapping[str, Tensor]], parameters: Mapping[str, Tensor]) -> Callable[[int], Tensor]:
    """Parameter number -> all directions `[D, *shape]`, wide, on the parameter's device."""
    for number, direction in enumerate(directions):
        for name, parameter in parameters.items():
            shape = tuple(direction[name].shape) if name in direction else None
            if shape != tuple(parameter.shape):
                raise InputError(
                    f"directions[{number}] has {'nothing' if shape is None else list(shape)} for {name!r}; accepted is "
                    f"a tensor of shape {list(parameter.shape)} for every trainable parameter's name."
                )
    named = list(parameters.items())

    @lru_cache(maxsize=1)  # a parameter that is reduced pair by pair asks for each of them
    def along(number: int) -> Tensor:
        name, parameter = named[number]
        parts = [direction[name].detach().to(parameter.device) for direction in directions]
        return torch.stack(parts).to(accumulator(parameter.dtype))

    return along


def _filled(before: Tensor, after: Tensor) -> Tensor:
    """`after` where it is known, else `before`."""
    return torch.where(after.isnan(), before, after)


def _check_finite(parameters: Sequence[str], names: Sequence[str], outcomes: Sequence[RowsOutcome]) -> None:
    for numbers, outcome in outcomes:
        if not outcome.entries or bool(torch.stack(list(outcome.entries.values())).isfinite().all()):
            continue
        for number, entry in outcome.entries.items():  # in the order of the backward pass
            bad = (~torch.isfinite(entry)).nonzero()
            if len(bad):
                name = names[numbers[int(outcome.wanted.places[0][int(bad[0])])]]
                raise NonFiniteError(
                    f"non-finite gradient: {name} has a nan or inf in the gradient of {parameters[number]!r} (first in "
                    "the backward pass), or its square overflows. Check the layers after it; try a wider dtype "
                    "(bfloat16 or float32 instead of float16), or check the checkpoint for nan."
                )


def _coverage(
    parameters: Mapping[str, Tensor], outcomes: Sequence[RowsOutcome], *, allow_uncovered: bool
) -> tuple[float, dict[str, str]]:
    """Share of the elements that were measured, and why what is left out is; an error unless that is allowed."""
    names = list(parameters)
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
    return coverage, uncovered


def _logps(outcomes: Sequence[RowsOutcome], count: int) -> Tensor:
    """Log-probs of all rows, float64 `[N]`."""
    logps = torch.zeros(count, dtype=torch.float64)
    for numbers, outcome in outcomes:
        logps[numbers] = outcome.logps
    return logps
