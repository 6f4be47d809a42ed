"""Products of float32 in float32, whatever a training run allows itself.

A run may compute float32 products in tf32 or bfloat16 (`torch.set_float32_matmul_precision`), and differentiate under
autocast. Its activations and cotangents are what they are then; what is made of them here is not to lose three digits
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["exact_products", "exactly"]

P = ParamSpec("P")
R = TypeVar("R")

_EXACT = "ieee"
_UNSET = "none"
_SETTING = "fp32_precision"


def exact_products(device: torch.device) -> AbstractContextManager[None]:
    """Inside, matrix products on a device are formed in their operands' own dtype: no autocast, no tf32.

    The allowance is one for the whole process and given back at the end: while this is active, products that another
    thread forms at the same time are exact as well.

    Args:
        device: where the operands are.

    Returns:
        A context manager, which does nothing where nothing has to be changed.
    """
    cast, allowed = torch.is_autocast_enabled(device.type), _allowed(device)
    return _exact(device, cast, allowed) if cast or allowed else nullcontext()


def exactly(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Decorator: `exact_products` on the device of the first argument.

    Args:
        function: takes a tensor first.

    Returns:
        The function.
    """

    @wraps(function)
    def run(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with exact_products(first.device):
            return function(first, *args, **kwargs)

    return run


@contextmanager
def _exact(device: torch.device, cast: bool, allowed: str) -> Iterator[None]:
    if allowed:
        _allow(device, _EXACT)
    try:
        with torch.autocast(device.type, enabled=False) if cast else nullcontext():
            yield
    finally:
        if allowed:
            _allow(device, allowed)


def _allowed(device: torch.device) -> str:
    """What float32 products may be computed in, as `_allow` takes it; "" where it is float32."""
    backend = _backend(device)
    if backend is None:  # torch 2.8
        precision = torch.get_float32_matmul_precision()
        return "" if precision == "highest" else precision
    own = str(backend.fp32_precision)
    general = str(getattr(torch.backends, _SETTING)) if own == _UNSET else own
    return "" if general in (_EXACT, _UNSET) else own


def _allow(device: torch.device, precision: str) -> None:
    backend = _backend(device)
    if backend is None:
        torch.set_float32_matmul_precision("highest" if precision == _EXACT else precision)
    else:
        setattr(backend, _SETTING, precision)


def _backend(device: torch.device) -> Any:
    """What holds the setting for a kind of device; None where there is one setting for all."""
    backend = getattr(getattr(torch.backends, "cuda" if device.type == "cuda" else "mkldnn"), "matmul", None)
    return backend if hasattr(backend, _SETTING) else None
