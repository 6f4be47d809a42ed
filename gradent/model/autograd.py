"""Plain autograd and `torch.func`: gradients of one log-prob, and calls of a model with other parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradent.errors import ModelError

__all__ = ["REENTRANT", "quiet_vmap", "row_gradients", "with_parameters"]

_T = TypeVar("_T")

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


def with_parameters(model: nn.Module, values: Mapping[str, Tensor], function: Callable[[nn.Module], _T]) -> _T:
    """`function(model)` with other tensors in the place of the model's parameters of these names."""
    # `functional_call` mixes up parameters that several modules share: every one is put back where it was.
    held = [(module, dict(module._parameters)) for module in model.modules()]  # noqa: SLF001
    try:
        result: _T = functional_call(_Called(model, function), {f"model.{name}": values[name] for name in values}, ())
        return result
    finally:
        for module, parameters in held:
            module._parameters.update(parameters)  # noqa: SLF001


class _Called(nn.Module):
    """A function of a model as a module, so that `functional_call` can swap the model's parameters."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Any:
        return self.function(self.model)
