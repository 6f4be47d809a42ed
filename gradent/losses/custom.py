"""A loss made from any differentiable function of the pairs' log-probs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from gradent.errors import InputError
from gradent.losses.base import ARGUMENTS, LOGPS, Loss, PairTerms

__all__ = ["CallableLoss", "from_callable"]


@final
@dataclass(frozen=True, kw_only=True)
class CallableLoss(Loss):
    """A user's scalar function as a `Loss`; made by `from_callable`."""

    name: str  # the function's own
    fn: Callable[..., Tensor]
    accepts: tuple[str, ...]  # which of the six arguments it takes
    requires: tuple[str, ...]  # those of them that it cannot do without

    def _uses(self) -> Sequence[str]:
        return [argument for argument in self.requires if argument not in LOGPS]

    def _reads(self) -> Sequence[str]:
        return (*LOGPS, *(argument for argument in self.accepts if argument not in LOGPS))

    def _call(self, terms: dict[str, Tensor]) -> Tensor:
        result: Any = self.fn(**{argument: terms[argument] for argument in self.accepts if argument in terms})
        if not isinstance(result, Tensor) or result.ndim != 0 or not result.is_floating_point():
            shape = f"shape {list(result.shape)}, {result.dtype}" if isinstance(result, Tensor) else repr(result)
            raise InputError(
                f"{self.name}: the loss function returned {type(result).__name__} ({shape}); accepted is one "
                "floating-point scalar tensor. End it with .sum() for weights per pair, or with .mean() for weights "
                "that carry the 1/B of a batch mean."
            )
        return result

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        def scalar(chosen_logp: Tensor, rejected_logp: Tensor) -> Tensor:
            result = self._call({**terms.given, "chosen_logp": chosen_logp, "rejected_logp": rejected_logp})
            if not result.requires_grad:
                raise InputError(
                    f"{self.name}: the loss function's result does not depend on chosen_logp or rejected_logp in a "
                    "way that can be differentiated (a .detach(), .item() or comparison on the way?)."
                )
            return result

        chosen, rejected = torch.func.grad(scalar, argnums=(0, 1))(terms.s_w, terms.s_l)
        return -chosen, rejected

    def _value(self, terms: PairTerms) -> Tensor:
        pairs = range(len(terms.s_w))
        losses = [self._call({name: values[i : i + 1] for name, values in terms.given.items()}) for i in pairs]
        return torch.stack(losses).to(torch.float64)


def from_callable(fn: Callable[..., Tensor]) -> Loss:
    """A `Loss` from any differentiable scalar function, its weights by `torch.func.grad`.

    The function takes any of `chosen_logp`, `rejected_logp`, `ref_chosen_logp`, `ref_rejected_logp`, `chosen_len`,
    `rejected_len` by name (or `**kwargs`), each a float64 `[B]` tensor, and returns one scalar tensor for the batch.
    It is handed only what it takes; a parameter with a default is left at its default when the caller has no value.

    `weights` gives `d_w = -∂fn/∂chosen_logp`, `d_l = +∂fn/∂rejected_logp`. With `.sum()` over the batch these are
    per-pair weights, as those of `losses.get`; a `.mean()` puts its 1/B in them. `value` calls the function once for
    each pair, as a batch of one.

    Args:
        fn: the function. Its randomness and side effects, if any, are the caller's affair.

    Returns:
        The loss; its `needs_reference` is True when `fn` has a `ref_*` parameter without a default.

    Raises:
        InputError: `fn` is not callable, takes neither log-prob, or requires an argument that is not one of the six.

    Example:
        >>> loss = from_callable(lambda chosen_logp, rejected_logp: (rejected_logp - chosen_logp).relu().sum())
        >>> d_w, d_l = loss.weights(chosen_logp=torch.tensor([-3.0]), rejected_logp=torch.tensor([-2.0]))
        >>> d_w.item(), d_l.item()
        (1.0, 1.0)
    """
    if not callable(fn):
        raise InputError(f"losses.from_callable: received {fn!r}; accepted is a function of {', '.join(ARGUMENTS)}.")
    name = getattr(fn, "__name__", type(fn).__name__)
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError as error:
        raise InputError(f"losses.from_callable: {name} has no readable signature; wrap it in a function.") from error
    accepts, requires = [], []
    for parameter in parameters:
        required = parameter.default is parameter.empty
        if parameter.kind is parameter.VAR_KEYWORD:
            accepts = list(ARGUMENTS)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue
        elif parameter.name in ARGUMENTS and parameter.kind is not parameter.POSITIONAL_ONLY:
            accepts.append(parameter.name)
            requires += [parameter.name] * required
        elif required:
            raise InputError(
                f"losses.from_callable: {name} requires {parameter.name!r}, which is not one of the keyword arguments "
                f"it can be given: {', '.join(ARGUMENTS)}. Bind it first, with functools.partial or a default."
            )
    if not any(argument in LOGPS for argument in accepts):
        raise InputError(f"losses.from_callable: {name} takes neither of {' and '.join(LOGPS)}; it needs one at least.")
    return CallableLoss(name=name, fn=fn, accepts=tuple(accepts), requires=tuple(requires))
