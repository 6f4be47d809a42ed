"""How long gradent itself has been at work inside somebody else's pass."""

from __future__ import annotations

import time
from types import TracebackType

__all__ = ["Clock"]


class Clock:
    """Adds up the wall time of `with clock:` blocks; a block inside a block counts once.

    Attributes:
        seconds: the sum. On a GPU, whose work is queued, it is the time on the host alone.
    """

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
        """The sum, which starts again at zero."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
