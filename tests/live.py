"""Bytes of tensors alive at once, counted at every operator: what a claim about memory is tested with."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators inside the context make, for as long as anything refers to them.

    A storage is watched, not the tensor that it came with: what a graph saves is often another tensor on it. Under
    `vmap` the operators that arrive here are those on whole batches. What an operator takes and gives back within
    itself is not seen.

    Attributes:
        peak: most bytes alive at once.
        now: bytes alive.
        made: size of every storage made, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.now = 0
        self.made: list[int] = []
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, given)
        return out

    def _see(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._watched or key in given or not size:
            return  # a view of something made before
        self._watched[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.made.append(size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._watched[key]
        self.now -= size
