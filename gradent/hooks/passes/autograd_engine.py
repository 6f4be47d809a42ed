"""Autograd's own gradients of rows that have a forward of their own, where they are small: LoRA, mostly.

No rule is involved and nothing is watched: with little to train, a row's gradient takes less than the bookkeeping of
every use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradent.hooks.passes.microbatch import Forward, MicroBatch, Outcome
from gradent.hooks.reduction.ledger import Ledger
from gradent.kernels.common.precision import is_exact
from gradent.model.autograd import row_gradients
from gradent.model.calls import forward_logits

__all__ = ["EXACT", "is_plain", "plain_rows", "rows_within", "run_plainly"]

EXACT = (torch.float32, torch.float64)
"""Dtypes in which autograd's gradients lose nothing that matters."""


def plain_rows(model: nn.Module, parameters: Sequence[Tensor], device: torch.device, budget: int) -> int:
    """Rows whose gradients autograd may form at once, as good as reduced uses; 0 if the hooks engine is cheaper.

    They are to be a small part of the model and to leave two thirds of the budget to their reduction, exact as they
    come (nothing in the model is narrower than float32), and unnoticed (a hook on a parameter would be called).
    """
    if not is_exact(device):
        return 0
    if any(type(part) is not nn.Parameter or part._backward_hooks for part in parameters):  # noqa: SLF001  (no public name)
        return 0
    everything = list(model.parameters())
    if any(parameter.dtype not in EXACT for parameter in everything):
        return 0
    # A quantised model keeps its scales there.
    if any(buffer.is_floating_point() and buffer.dtype not in EXACT for buffer in model.buffers()):
        return 0
    model_bytes, bytes_trained = (sum(p.numel() * p.element_size() for p in some) for some in (everything, parameters))
    return rows_within(model_bytes, bytes_trained, budget)


def is_plain(forwards: Sequence[Sequence[int]], few: int) -> bool:
    """Whether autograd's gradients are the way: no forward is shared, and rows are at most `few` (of `plain_rows`)."""
    return len(forwards) <= few and all(len(members) == 1 for members in forwards)


def rows_within(model_bytes: int, trained_bytes: int, budget: int) -> int:
    """Rows whose gradients take half of the model's bytes at most, and a third of the budget: they are copied twice."""
    return min(model_bytes // 2, budget // 3) // max(1, trained_bytes)


def run_plainly(model: nn.Module, parameters: Sequence[Tensor], micro: MicroBatch, ledger: Ledger) -> Outcome:
    """Measure one micro-batch, one forward and backward a row; raises what `hooks_engine.run` does, and ModelError."""
    logps = torch.zeros(len(micro.rows), dtype=torch.float64)
    budget = ledger.budget
    for members in micro.forwards:
        forward = Forward(micro, members)
        logp = forward.logps(forward_logits(model, forward.ids, keep=forward.keep), budget)
        logps[list(members)] = logp.detach().cpu()
        grads = row_gradients(logp.sum(), parameters)
        for number, grad in reversed(list(enumerate(grads))):  # about the order of the backward pass
            if grad is not None:
                ledger.add_rows(number, members, (), grad[None])
    ledger.close()
    return Outcome(ledger.entries, logps, ledger.wanted)
