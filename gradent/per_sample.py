"""The second opinion: `torch.func` per-sample gradients of the whole model, two rows at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from gradent.errors import GradentWarning
from gradent.hooks.engine import Outcome
from gradent.hooks.forms import Explicit
from gradent.hooks.ledger import Ledger
from gradent.hooks.logprob import check_logps
from gradent.kernels.plan import DEFAULT_BUDGET
from gradent.model import forward_logits

__all__ = ["per_sample_pairs"]

Row = tuple[Tensor, Tensor]


def per_sample_pairs(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    *,
    weight: Callable[[int], Tensor] | None,
    randomness: bool,
) -> list[tuple[list[int], Outcome]]:
    """Measure every pair by `vmap(grad)`, one pair at a time; memory: two gradients of the whole model.

    Where vmap cannot run the model (data-dependent control flow, as in mixtures of experts), `grad` alone runs it a row
    at a time; that is announced once.

    Args:
        model: the model, in the mode in which it is to be measured.
        parameters: its trainable parameters by name.
        rows: `(ids int64 [T], marks bool [T])` of 2B rows, on the model's device.
        weight: parameter number -> square root of the metric's diagonal, or None.
        randomness: rows draw different random numbers (dropout).

    Returns:
        `(pair numbers, outcome)` of each pair.

    Raises:
        NonFiniteError: a log-prob is nan or infinite.
    """
    half = len(rows) // 2
    tensors = {name: tensor.detach() for name, tensor in parameters.items()}
    differentiate = grad_and_value(_logp, argnums=1)
    mapped = vmap(differentiate, in_dims=(None, None, 0, 0), randomness="different" if randomness else "error")
    batched = True
    outcomes = []
    for pair in range(half):
        two = [rows[pair], rows[half + pair]]
        longest = max(len(ids) for ids, _ in two)
        padded = [
            torch.stack([nn.functional.pad(row[part], (0, longest - len(row[part]))) for row in two]) for part in (0, 1)
        ]
        ledger = Ledger(1, budget=DEFAULT_BUDGET, weight=weight)
        if batched:
            try:
                with warnings.catch_warnings():
                    # vmap loops where it has no batching rule, and says so at every operator.
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    grads, logps = mapped(model, tensors, *padded)
            except (RuntimeError, NotImplementedError, ValueError, IndexError) as error:
                batched = False
                warnings.warn(
                    "gradent's engine='func' runs this model a row at a time, without vmap, which cannot run it: "
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                    GradentWarning,
                    stacklevel=3,
                )
        if not batched:
            found = [differentiate(model, tensors, *row) for row in two]
            grads = {name: [grad[name] for grad, _ in found] for name in tensors}
            logps = torch.stack([logp for _, logp in found])
        check_logps(logps, [pair, pair], [True, False])
        for number, name in enumerate(tensors):
            for row in (0, 1):
                ledger.add(number, row, (), Explicit(grads[name][row]))
            ledger.finish(number)
        outcomes.append(([pair], Outcome(ledger.entries, logps.double().cpu(), {})))
    return outcomes


def _logp(model: nn.Module, parameters: Mapping[str, Tensor], ids: Tensor, marks: Tensor) -> Tensor:
    """Summed completion log-prob of one row, in plain differentiable torch."""
    logits = functional_call(_Logits(model), {f"model.{name}": tensor for name, tensor in parameters.items()}, (ids,))
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = torch.log_softmax(logits[:-1].to(wide), -1)
    return (scores.gather(1, ids[1:, None])[:, 0] * marks[1:]).sum()


class _Logits(nn.Module):
    """The model as a function of one row of ids, so that `functional_call` can swap its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return forward_logits(self.model, ids[None], None)[0]
