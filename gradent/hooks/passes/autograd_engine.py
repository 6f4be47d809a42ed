"""Autograd's own gradients of rows that have a forward of their own, where they are small: LoRA, mostly.

No rule is involved and nothing is watched: with little to train, a row's gradient takes less than the bookkeeping of
every use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradent.errors import ModelError
from gradent.hooks.capture.coverage import HIDDEN
from gradent.hooks.passes.microbatch import Forward, MicroBatch, Outcome
from gradent.hooks.reduction.ledger import Ledger
from gradent.kernels.common.precision import is_exact

__all__ = ["EXACT", "is_plain", "plain_rows", "rows_within", "run_plainly"]

EXACT = (torch.float32, torch.float64)
"""Dtypes in which autograd's gradients lose nothing that matters."""


def plain_rows(model: nn.Module, parameters: Sequence[Tensor], device: torch.device, budget: int) -> int:
    """How many rows' gradients autograd may form at once, as good as reduced uses; 0 if it had better not.

    They are to be a small part of the model and to leave two thirds of the budget to their reduction. They are to be
    exact as they come (nothing in the model is narrower than float32), and nobody is to notice (a hook on a parameter
    would be called).

    Args:
        model: the model.
        parameters: its trainable parameters.
        device: where the model runs.
        budget: bytes of scratch.

    Returns:
        The number of rows.
    """
    if not is_exact(device):
        return 0
    if any(type(one) is not nn.Parameter or one._backward_hooks for one in parameters):  # noqa: SLF001  (no public name)
        return 0
    everything = list(model.parameters())
    if any(one.dtype not in EXACT for one in everything):
        return 0
    # A quantised model keeps its scales there.
    if any(one.is_floating_point() and one.dtype not in EXACT for one in model.buffers()):
        return 0
    whole, part = (sum(one.numel() * one.element_size() for one in some) for some in (everything, parameters))
    return rows_within(whole, part, budget)


def is_plain(groups: Sequence[Sequence[int]], few: int) -> bool:
    """Whether autograd's gradients are the way: no forward is shared, and rows are at most as many as it may form.

    Args:
        groups: rows of each forward of a micro-batch.
        few: of `plain_rows`.

    Returns:
        The answer.
    """
    return len(groups) <= few and all(len(group) == 1 for group in groups)


def rows_within(whole: int, part: int, budget: int) -> int:
    """How many rows' gradients are a small part of a model, and of the budget.

    Args:
        whole: bytes of the model's parameters.
        part: bytes of those that are trainable.
        budget: bytes of scratch.

    Returns:
        The number of rows. Their gradients take half of the model's bytes at most, and a third of the budget: twice as
        much again is copied while they are reduced.
    """
    return min(whole // 2, budget // 3) // max(1, part)


def run_plainly(
    model: nn.Module,
    parameters: Sequence[Tensor],
    micro: MicroBatch,
    *,
    budget: int,
    weight: Callable[[int], Tensor] | None = None,
) -> Outcome:
    """Measure one micro-batch, one backward a row.

    Args:
        model: the model, in the mode in which it is to be measured.
        parameters: its trainable parameters; their numbers are their places here.
        micro: the rows, each a group of its own; at most `plain_rows`.
        budget: bytes of a reduction's tiles.
        weight: see `Ledger`.

    Returns:
        The outcome.

    Raises:
        ModelError: a reentrant checkpointed region hides parameters.
        NonFiniteError: a log-prob is nan or infinite.
    """
    ledger = Ledger(len(micro.rows) // 2, budget=budget, weight=weight)
    logps = torch.zeros(len(micro.rows), dtype=torch.float64)
    for group in micro.groups:
        forward = Forward(micro, group)
        found = forward.logps(forward.logits(model), budget)
        logps[list(group)] = found.detach().cpu()
        grads = _gradients(found.sum(), parameters)
        for number in reversed(range(len(grads))):  # about the order of the backward pass
            grad = grads[number]
            if grad is not None:
                ledger.add_rows(number, group, (), (grad.to_dense() if grad.is_sparse else grad)[None])
    ledger.close()
    return Outcome(ledger.entries, logps, {})


def _gradients(total: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(total, list(parameters), allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ModelError(HIDDEN) from error
