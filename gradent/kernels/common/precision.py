"""Products of float32 in float32, whatever a training run allows itself.

A run may compute float32 products in tf32 or bfloat16 (`torch.set_float32_matmul_precision`), and differentiate under
autocast. Its activations and cotangents are what they are then; what is made of them here is not to lose three digits
more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["exact_products", "exactly", "is_exact"]

P = ParamSpec("P")
R = TypeVar("R")

_EXACT = "ieee"
_UNSET = "none"
_SETTING = "fp32_precision"

_thread = threading.local()
"""`kind`: the type of device on which products are exact in this thread already."""

_lock = threading.Lock()
_inside: dict[str, int] = {}
"""Type of device -> how many threads are inside."""
_allowance: dict[str, str] = {}
"""Type of device -> what float32 products may be computed in outside, as the first thread to come inside found it."""


class exact_products:
    """Inside, matrix products on a type of device are formed in their operands' own dtype: no autocast, no tf32.

    The allowance is one for the whole process, given back by the last thread that is inside: until then, products of
    other threads are exact as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._kind = device.type
        self._before: str | None = None
        self._nested = False
        self._cast: torch.autocast | None = None

    def __enter__(self) -> None:
        self._before = getattr(_thread, "kind", None)
        self._nested = self._before == self._kind
        if self._nested:
            return
        with _lock:
            if not _inside.get(self._kind):
                _allowance[self._kind] = _allowed(self._kind)
                if _allowance[self._kind]:
                    _allow(self._kind, _EXACT)
            _inside[self._kind] = _inside.get(self._kind, 0) + 1
        if torch.is_autocast_enabled(self._kind):
            self._cast = torch.autocast(self._kind, enabled=False)
            self._cast.__enter__()  # type: ignore[no-untyped-call]
        _thread.kind = self._kind

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _thread.kind = self._before
        if self._nested:
            return
        if self._cast is not None:
            self._cast.__exit__(kind, error, trace)
        with _lock:
            _inside[self._kind] -= 1
            if not _inside[self._kind] and _allowance[self._kind]:
                _allow(self._kind, _allowance[self._kind])


def is_exact(device: torch.device) -> bool:
    """Whether products of float32 are formed in float32 on a device as it is, without `exact_products`."""
    return not torch.is_autocast_enabled(device.type) and not _allowed(device.type)


def exactly(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Decorator: `exact_products` on the device of the first argument, a tensor."""

    @wraps(function)
    def run(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with exact_products(first.device):
            return function(first, *args, **kwargs)

    return run


def _allowed(kind: str) -> str:
    """What float32 products may be computed in, as `_allow` takes it; "" where it is float32."""
    backend = _backend(kind)
    if backend is None:  # torch 2.8
        precision = torch.get_float32_matmul_precision()
        return "" if precision == "highest" else precision
    own = str(backend.fp32_precision)
    general = str(getattr(torch.backends, _SETTING)) if own == _UNSET else own
    return "" if general in (_EXACT, _UNSET) else own


def _allow(kind: str, precision: str) -> None:
    backend = _backend(kind)
    if backend is None:
        torch.set_float32_matmul_precision("highest" if precision == _EXACT else precision)
    else:
        setattr(backend, _SETTING, precision)


@cache
def _backend(kind: str) -> Any:
    """What holds the setting for a kind of device; None where there is one setting for all."""
    backend = getattr(getattr(torch.backends, "cuda" if kind == "cuda" else "mkldnn"), "matmul", None)
    return backend if hasattr(backend, _SETTING) else None
