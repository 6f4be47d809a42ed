"""Bytes of tensors alive at once, counted at every operator: what a claim about memory is tested with."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators inside the context make and that are still referred to.

    Attributes:
        peak: most bytes alive at once.
        made: size of every storage made, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.made: list[int] = []
        self._total = 0
        self._sizes: dict[int, int] = {}
        self._owners: dict[int, dict[int, weakref.ref[Tensor]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor):
                self._see(tensor, given)
        return out

    def _see(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._sizes:
            if address in given or address == 0:
                return  # a view of something made before
            self._sizes[address] = storage.nbytes()
            self._owners[address] = {}
            self.made.append(storage.nbytes())
            self._total += storage.nbytes()
            self.peak = max(self.peak, self._total)
        key = id(tensor)
        self._owners[address][key] = weakref.ref(tensor, lambda _: self._drop(address, key))

    def _drop(self, address: int, key: int) -> None:
        del self._owners[address][key]
        if not self._owners[address]:
            self._total -= self._sizes.pop(address)
            del self._owners[address]
