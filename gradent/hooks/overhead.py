"""How long gradent itself works inside a trainer's pass."""

from __future__ import annotations

import time
from types import TracebackType

import torch

from gradent.kernels.common.streams import is_capturing

__all__ = ["Clock", "wait_for"]


class Clock:
    """Adds up the host's wall time of `with clock:` blocks in `seconds`; a block inside a block counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._since = 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._since = time.perf_counter()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._since

    def take(self) -> float:
        """The sum; start again at zero."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def wait_for(device: torch.device) -> None:
    """Synchronize the device before timing, so that earlier work is not billed to gradent."""
    if device.type == "cuda" and not is_capturing(device):
        torch.cuda.current_stream(device).synchronize()
