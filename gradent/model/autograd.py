"""Plain autograd: the gradients of one log-prob, and one wording where checkpointing does not allow them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gradent.errors import ModelError

__all__ = ["REENTRANT", "quiet_vmap", "row_gradients"]

REENTRANT = (
    "Reentrant gradient checkpointing hides the layers inside it from a measurement. Use "
    "gradient_checkpointing_kwargs={'use_reentrant': False}, or switch checkpointing off meanwhile."
)
"""The error of a graph with reentrant regions."""


def row_gradients(logp: Tensor, parameters: Sequence[Tensor], *, keep_graph: bool = False) -> list[Tensor | None]:
    """Dense gradients of a scalar log-prob, one a parameter; None for a parameter that it does not depend on."""
    if not logp.requires_grad:
        raise ModelError(
            "no trainable parameter reaches the logits: a log-prob has no graph. Reentrant gradient checkpointing "
            "behind a frozen embedding does this, and so does a forward under torch.no_grad(): switch it off."
        )
    try:
        grads = torch.autograd.grad(logp, list(parameters), allow_unused=True, retain_graph=keep_graph)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ModelError(REENTRANT) from error
    return [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Silence torch's vmap-fallback performance warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield
