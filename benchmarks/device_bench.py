"""What every part of benchmarks/device.py is given: a device, a clock, an end of its time, and rows to write.

Letters: O and I the two sides of a weight, T tokens of a row, k pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.append import append

__all__ = ["COLUMNS", "Bench", "Times", "version_of"]

COLUMNS = (
    "triton", "cuda", "part", "what", "dtype", "rows", "cols", "tokens", "pairs", "path", "rounds", "p10_ms",
    "median_ms", "p90_ms", "tflops", "gbytes_s", "of_gemm", "ratio", "against", "error", "budget_mib", "peak_mib",
    "of_budget", "rule", "note",
)  # fmt: skip
"""Of the CSV, behind those of benchmarks/append.py. `tflops` counts the products that are really formed; `of_gemm` is
their share of the measured bf16 GEMM rate; `ratio` is the median as a multiple of that of `against`, of the same
rounds; `error` is scaled by `‖G_i‖‖G_j‖`; `rule` is ⅔h; a step's `peak_mib` is what it adds to the plain step's."""

AHEAD = 8192
"""Side of the product that keeps the device busy while the host queues what is timed: 1.4 ms on an H100."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one thing, over rounds."""

    taken: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.taken)

    @property
    def columns(self) -> dict[str, Any]:
        """Rounds and percentiles."""
        low, high = (sorted(self.taken)[round(part * (len(self.taken) - 1))] for part in (0.1, 0.9))
        return {"rounds": len(self.taken), "p10_ms": low, "median_ms": self.median, "p90_ms": high}


class Bench:
    """One part's run.

    Args:
        part: its name.
        device: where it runs.
        toy: sizes that a CPU can do in a second.
        seconds: after which no further case is begun.
        folder: of the CSV; None to write none.
        commit: for the rows; None to ask git.
    """

    def __init__(
        self, part: str, device: torch.device, *, toy: bool, seconds: float, folder: Path | None, commit: str | None
    ) -> None:
        self.part, self.device, self.toy = part, device, toy
        self.console = Console(highlight=False, width=160)
        self.written = 0
        self._ends = time.perf_counter() + seconds
        self._folder, self._commit = folder, commit
        self._ahead: tuple[Tensor, Tensor] | None = None
        self._generator = torch.Generator(device).manual_seed(0)
        self._versions = {"triton": version_of("triton"), "cuda": torch.version.cuda or ""}

    @property
    def left(self) -> float:
        """Seconds until no further case is begun."""
        return self._ends - time.perf_counter()

    def put(self, what: str, **figures: Any) -> None:
        """Print a row and append it to the CSV, if there is one.

        Args:
            what: it is a row of.
            figures: by column.
        """
        unknown = set(figures) - set(COLUMNS)
        assert not unknown, unknown
        row = {**self._versions, "part": self.part, "what": what, **figures}
        shown = (f"{name} {_short(value)}" for name, value in figures.items() if value not in {"", None})
        self.console.print(f"{self.part:<9} {what:<24} {', '.join(shown)}", soft_wrap=True, markup=False)
        self.written += 1
        if self._folder is not None:
            whole = {name: row.get(name, "") for name in COLUMNS}
            append("device", whole, folder=self._folder, commit=self._commit)

    def say(self, text: str) -> None:
        """Print a line that is no row."""
        self.console.print(f"{self.part:<9} {text}", soft_wrap=True, markup=False)

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal random numbers on the device, the same in every run of a part."""
        return torch.randn(shape, device=self.device, generator=self._generator).to(dtype)

    def turns(
        self,
        functions: Mapping[str, Callable[[], Any]],
        *,
        rounds: int,
        seconds: float,
        ahead: bool = True,
        wall: bool = False,
    ) -> dict[str, Times]:
        """Time functions that take turns, warm.

        Args:
            functions: by name.
            rounds: most of them; at least three are made (of toys, two).
            seconds: most time for all of them, after three rounds and a first call of each, which compiles.
            ahead: the device is kept busy while the host queues, so that its own time is what is measured.
            wall: by the host's clock, until the device is done, instead of by CUDA's events.

        Returns:
            Times by name; on a CPU, of the host's clock.
        """
        rounds = 2 if self.toy else rounds
        for function in [*functions.values()] * (1 if self.toy else 2):
            function()
        self._wait()
        taken: dict[str, Times] = {name: Times() for name in functions}
        names, began = list(functions), time.perf_counter()
        for number in range(rounds):
            if number >= 3 and time.perf_counter() - began > min(seconds, max(0.0, self.left)):
                break
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                taken[name].taken.append(self._time(functions[name], ahead=ahead, wall=wall))
        return taken

    def _time(self, function: Callable[[], Any], *, ahead: bool, wall: bool) -> float:
        """Milliseconds of a call."""
        if wall or self.device.type != "cuda":
            self._wait()
            began = time.perf_counter()
            function()
            self._wait()
            return (time.perf_counter() - began) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            self._keep_busy()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _keep_busy(self) -> None:
        if self._ahead is None:
            matrix = self.draw(AHEAD, AHEAD)
            self._ahead = matrix, torch.empty_like(matrix)
        torch.mm(self._ahead[0], self._ahead[0], out=self._ahead[1])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self, function: Callable[[], Any]) -> int:
        """Most bytes that the allocator had handed out at once during a call, beyond what it had before.

        Args:
            function: has been called before, so that libraries have their workspaces.

        Returns:
            Bytes; on a CPU by the profiler's count of the allocator.
        """
        if self.device.type != "cuda":
            from benchmarks.scratch import taken  # noqa: PLC0415  (more than a GPU's run needs)

            return taken(function)
        self._wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        self._wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def gemm(self, side: int) -> float:
        """The machine's bf16 GEMM rate, in flops a second: the median over products of square matrices, random data."""
        left, right = self.draw(side, side), self.draw(side, side)
        out = torch.empty_like(left)
        times = self.turns({"gemm": lambda: torch.mm(left, right, out=out)}, rounds=30, seconds=1.0, ahead=True)
        return 2 * side**3 / times["gemm"].median * 1e3


def version_of(package: str) -> str:
    """Of an installed package; "" where there is none."""
    import importlib.metadata  # noqa: PLC0415

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
