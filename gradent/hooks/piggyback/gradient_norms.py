"""What becomes of a gradient between the end of its backward and the optimizer: clipped, unscaled, divided.

Letters: P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradent.hooks.overhead import Clock
from gradent.kernels.common.numerics import accumulator

__all__ = ["GradientNorms", "gradient_norms"]

SPREAD = 1e-3
"""Most by which a parameter's factor may differ from all others', relative, beside the rounding of its gradient."""


def gradient_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms of the gradients that parameters have now, float64 `[P]` on the CPU; nan for none."""
    norms = [
        None
        if tensor.grad is None
        else torch.linalg.vector_norm(tensor.grad, dtype=accumulator(tensor.grad.dtype)).double()
        for tensor in tensors
    ]
    device = next((norm.device for norm in norms if norm is not None), torch.device("cpu"))
    nan = torch.full((), float("nan"), dtype=torch.float64, device=device)
    return torch.stack([nan if norm is None else norm.to(device) for norm in norms]).cpu()


class GradientNorms:
    """The norms of all gradients at the end of a backward, and the factor by which they are changed afterwards."""

    def __init__(self, tensors: Sequence[Tensor], clock: Clock) -> None:
        self._tensors, self._clock = tensors, clock
        self._norms: Tensor | str = "the end of the backward was not seen"

    def start(self) -> None:
        """Note the norms when the running backward ends; to be called inside it."""
        # Twice: DistributedDataParallel, which averages over ranks, queues its own callback while the backward runs.
        queue = torch.autograd.Variable._execution_engine.queue_callback  # noqa: SLF001  (no public name)
        queue(lambda: queue(self._note))

    def _note(self) -> None:
        try:
            with self._clock:
                self._norms = gradient_norms(self._tensors)
        except Exception as error:  # noqa: BLE001  (it would end the trainer's backward)
            self._norms = f"the gradients have no norms ({type(error).__name__}: {error})"

    def factor(self) -> float | str:
        """What every gradient has been multiplied by since, or why that is no one number."""
        if isinstance(self._norms, str):
            return self._norms
        before, now = self._norms, gradient_norms(self._tensors)
        if bool((now.isnan() & (before > 0)).any()) or bool(before.isnan().all()):
            return "the gradients are gone before the optimizer's step: it steps inside the backward"
        if bool((before.isinf() | now.isinf()).any()) or bool((before.isnan() & ~now.isnan()).any()):
            return "a gradient is not finite"
        moved = before > 0
        if not bool(moved.any()):
            return "no parameter got a gradient"
        factors = now[moved] / before[moved]
        factor = float(now[moved].norm() / before[moved].norm())
        # A gradient that all but vanishes is rounding.
        matters = before[moved] > 1e-6 * before[moved].max()
        rounding = torch.tensor([2 * torch.finfo(tensor.dtype).eps for tensor in self._tensors], dtype=torch.float64)
        if bool(((factors - factor).abs() > (SPREAD + rounding[moved]) * factor)[matters].any()):
            return "gradients were changed by other means than one factor for all (clipped by value, say)"
        return factor
