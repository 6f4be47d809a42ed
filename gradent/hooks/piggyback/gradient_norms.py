"""What becomes of a gradient between the end of its backward and the optimizer: clipped, unscaled, divided.

Letters: P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradent.kernels.common.numerics import accumulator

__all__ = ["GradientNorms", "gradient_norms"]

SPREAD = 1e-3
"""Most by which the factors of two parameters may differ, relative: more than rounding is no common factor."""


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

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._norms: Tensor | None = None

    def start(self) -> None:
        """Note the norms when the running backward ends; to be called inside it."""
        # Twice: DistributedDataParallel, which averages over ranks, queues its own callback while the backward runs.
        queue = torch.autograd.Variable._execution_engine.queue_callback  # noqa: SLF001  (no public name)
        queue(lambda: queue(self._note))

    def _note(self) -> None:
        self._norms = gradient_norms(self._tensors)

    def factor(self) -> float | str:
        """What every gradient has been multiplied by since, or why that is no one number."""
        if self._norms is None:
            return "the end of the backward was not seen"
        before, now = self._norms, gradient_norms(self._tensors)
        if bool((now.isnan() & (before > 0)).any()) or bool(before.isnan().all()):
            return "the gradients are gone before the optimizer's step: it steps inside the backward"
        moved = (before > 0) & now.isfinite() & before.isfinite()
        if not bool(moved.any()):
            return "no parameter got a gradient"
        factors = now[moved] / before[moved]
        factor = float(now[moved].norm() / before[moved].norm())
        # A gradient that all but vanishes is rounding, in bfloat16 above all.
        matters = before[moved] > 1e-6 * before[moved].max()
        if bool(((factors - factor).abs() > SPREAD * factor)[matters].any()):
            return "gradients were changed by other means than one factor for all (clipped by value, say)"
        return factor
