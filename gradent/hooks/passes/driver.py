"""From a list of rows to micro-batches, batched where the model allows it: the outer loop of the hooks engine."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradent.errors import GradentWarning, ModelError
from gradent.hooks.passes.autograd_engine import is_plain, plain_rows, run_plainly
from gradent.hooks.passes.batching import group_rows, micro_batches
from gradent.hooks.passes.hooks_engine import NeedsSingleRows, run
from gradent.hooks.passes.microbatch import MicroBatch, Outcome
from gradent.kernels.common.cost import DEFAULT_BUDGET
from gradent.model.facts import announce_untrimmed, longest_input, require_causal, trims
from gradent.model.observed import observed

__all__ = ["agreement", "announce_single_rows", "measure_pairs", "rows_share"]

Row = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Batching:
    """How a model's rows are measured: in shared forwards or not, and with the logits of responses alone or of all."""

    shared: bool
    trim: bool = False


# What was found out about a model, so that it is found out once, by the names of what is trainable in it.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], _Batching]] = weakref.WeakKeyDictionary()

# Scaled difference beyond which a batched forward and single rows are not the same measurement. Rounding alone stays
# far below; rows mistaken for one another are wrong in the first digit.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-4}
_AGREEMENT_NARROW = 0.2


def measure_pairs(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    *,
    budget: int | None,
    weight: Callable[[int], Tensor] | None,
    dropout: bool,
) -> list[tuple[list[int], Outcome]]:
    """Measure every pair.

    The first pair that a model is measured on is measured twice: one row a forward, all its logits formed (which needs
    no assumption about the model), and in one padded forward, prompts' logits left out if the model offers that. Only
    where the two agree are rows batched from then on.

    Args:
        model: the model, in the mode in which it is to be measured.
        parameters: its trainable parameters by name.
        rows: `(ids int64 [T], marks bool [T])` of 2B rows, on the model's device.
        budget: the user's memory budget in bytes, or None.
        weight: parameter number -> square root of the metric's diagonal, or None.
        dropout: the model is in training mode.

    Returns:
        `(pair numbers, outcome)` of each micro-batch; every pair once.

    Raises:
        NotCausalError: a later token changes an earlier prediction.
        NonFiniteError: a log-prob is nan or infinite.
    """
    half, device, scratch = len(rows) // 2, rows[0][0].device, budget or DEFAULT_BUDGET
    tensors = list(parameters.values())
    few = plain_rows(model, tensors, device, scratch)

    def run_one(micro: MicroBatch) -> Outcome:
        if is_plain(micro.groups, few):
            return run_plainly(model, tensors, micro, budget=scratch, weight=weight)
        return run(model, tensors, micro, budget=scratch, explicit_budget=budget, weight=weight)

    def alone(pair: int) -> MicroBatch:
        return MicroBatch([rows[pair], rows[half + pair]], [[0], [1]], [pair])

    known, key = _KNOWN.setdefault(model, {}), tuple(parameters)
    outcomes: list[tuple[list[int], Outcome]] = []
    batches = micro_batches([(len(rows[pair][0]), len(rows[half + pair][0])) for pair in range(half)], device)
    if key not in known:
        first = batches[0][0]
        with observed(model):  # in eval mode: dropout would make two looks at one pair differ
            require_causal(model, rows[first][0])
            outcome = run_one(alone(first))
            known[key] = _find_batching(model, list(parameters), alone(first), outcome, run_one)
        if not dropout and not known[key].shared:  # else it is measured again, so that every call gives the same bits
            outcomes.append(([first], outcome))
            batches[0].remove(first)
    for pairs in filter(None, batches):
        if known[key].shared:
            batch_rows = [*(rows[pair] for pair in pairs), *(rows[half + pair] for pair in pairs)]
            groups = group_rows([len(ids) for ids, _ in batch_rows], device, few=few)
            try:
                outcomes.append((pairs, run_one(MicroBatch(batch_rows, groups, pairs, trim=known[key].trim))))
                continue
            except NeedsSingleRows as need:  # the model changed since it was tried (another attention, say)
                known[key] = _Batching(shared=False)
                announce_single_rows(need, list(parameters))
        outcomes += [([pair], run_one(alone(pair))) for pair in pairs]
    return outcomes


def rows_share(model: nn.Module, parameters: Mapping[str, Tensor]) -> bool | None:
    """Whether rows of the model can share a forward, as `measure_pairs` found out.

    Args:
        model: the model.
        parameters: its trainable parameters by name.

    Returns:
        The answer; None for a model that has not been measured yet.
    """
    found = _KNOWN.get(model, {}).get(tuple(parameters))
    return None if found is None else found.shared


def agreement(model: nn.Module, device: torch.device) -> float:
    """Scaled difference that rounding alone may make between two ways of measuring one thing.

    Args:
        model: the model.
        device: where it computes.

    Returns:
        The limit, by the narrowest arithmetic: autocast's, or that of the parameters.
    """
    if torch.is_autocast_enabled(device.type):
        return _AGREEMENT_NARROW
    return max(_AGREEMENT.get(parameter.dtype, _AGREEMENT_NARROW) for parameter in model.parameters())


def _find_batching(
    model: nn.Module,
    names: Sequence[str],
    pair: MicroBatch,
    single: Outcome,
    run_one: Callable[[MicroBatch], Outcome],
) -> _Batching:
    """Which padded forwards of two rows agree with two forwards of one row; announced where none does."""
    # Padded until its length differs from its number of rows: one axis cannot pass for the other.
    longest = max(len(ids) for ids, _ in pair.rows)
    room = longest_input(model)
    both = MicroBatch(pair.rows, [[0, 1]], pair.pairs, least_length=longest + 3 if longest + 3 <= room else 0)
    limit = agreement(model, pair.rows[0][0].device)
    # This pair's prompts may be too short to tell; what is seen here is that gradients follow.
    reason = ""
    if trims(model, pair.rows[0][0]):
        try:
            if _difference(single, run_one(replace(both, trim=True))) <= limit:
                return _Batching(shared=True, trim=True)
            reason = "they lead to other gradients"
        except NeedsSingleRows:
            reason = "no rule can tell the rows of a batched forward apart"
        except (ModelError, TypeError, ValueError, IndexError, RuntimeError) as raised:
            reason = f"{type(raised).__name__}: {raised}"
    try:
        error = _difference(single, run_one(both))
    except NeedsSingleRows as need:
        announce_single_rows(need, names)
        return _Batching(shared=False)
    if error > limit:
        _announce(f"a batched forward of two rows differs from two forwards of one row by {error:.1e} (scaled)")
    elif error <= limit and reason:
        announce_untrimmed(model, reason)
    return _Batching(shared=error <= limit)


def _difference(single: Outcome, both: Outcome) -> float:
    """How far two outcomes of one pair lie apart, scaled by its norms."""
    totals = [torch.stack([entry.cpu()[0] for entry in outcome.entries.values()]).sum(0) for outcome in (single, both)]
    norms = totals[0][:2].clamp_min(1e-300).sqrt()
    return float(((totals[0] - totals[1]).abs() / torch.stack((*norms.square(), norms.prod()))).max())


def announce_single_rows(need: NeedsSingleRows, names: Sequence[str]) -> None:
    """Say that rows go through the model one by one, and because of which parameters.

    Args:
        need: what a batched forward raised.
        names: the trainable parameters' names.
    """
    listed = ", ".join(names[number] for number in sorted(need.params)[:4])
    more = f" and {len(need.params) - 4} more" if len(need.params) > 4 else ""
    _announce(f"no rule can tell the rows of a batched forward apart where it uses {listed}{more}")


def _announce(reason: str) -> None:
    warnings.warn(
        f"gradent measures this model one row a forward (as exact, but not batched): {reason}.",
        GradentWarning,
        stacklevel=5,
    )
