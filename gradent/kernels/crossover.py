"""Where gram and outer really cross on this device: the price of a gram flop, in outer flops, measured at first use.

The cost model counts flops, and takes one for as dear as another. How nearly that is so hangs on the processor, the
threads, the dtype and the code that reduces, so it is measured: both forms of one pair, at the size at which the model
has them equal. The price is rounded to a power of √2 between 1/4 and 4, so that noise rarely changes it. It is kept in
the process and in `crossover.json` of the user's cache directory: `GRADENT_CACHE`, else `$XDG_CACHE_HOME/gradent`, else
`~/.cache/gradent`. On a machine that is busy with other work nothing can be measured: the model's 1 then holds for the
process. Only speed hangs on any of this: both forms are exact.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gradent.errors import InputError
from gradent.kernels.common.cost import DEPTH, LEAST_PRICE, MOST_PRICE, Plan
from gradent.kernels.common.streams import is_capturing
from gradent.record.atomic import write_whole

__all__ = ["adopt", "cache_file", "device_name", "is_measured", "known", "price"]

SIDE = {"cpu": 512, "cuda": 4096}
"""O and I of the measured weight: beyond the smallest caches, and 5 MB of operands and tiles on a CPU.

On a GPU 45 MB (16 bits) or 90 MB (float32) of operands, torch's tiles on top: some 90 Gflop a call, so that the device
takes longer for it than Python for its launch.
"""

REPEATS = 8
"""Calls between two events of a GPU, behind one that keeps it busy while they are queued."""

ROUNDS = 15
SECONDS = 0.2
"""Most time for a measurement; a slow machine makes fewer rounds, at least two."""

CALM = 1.25
"""Most that the median may take, as a multiple of the fastest round, for a measurement to count."""

SHARE = 0.8
"""Least part of the time, times threads, in which a CPU was this process's own, for a measurement to count."""

STEPS = 2
"""Steps of the price's grid in a factor of 2."""

VERSION = 2
"""Of the cache file; it grows when a price changes meaning."""

_known: dict[str, float] = {}
_unsure: set[str] = set()
_lock = threading.Lock()


NEEDED = {"cpu": 6 * 2**20, "cuda": 256 * 2**20}
"""Bytes that a measurement takes at most."""


def price(
    device: torch.device | str, dtype: torch.dtype, *, path: str | None = None, budget: int | None = None
) -> float:
    """How many times dearer a gram flop is than an outer flop on a device.

    Measured where nothing is known yet (in less than 0.3 s on a CPU; a GPU's kernels are compiled first), with the
    functions that reduce: those of `gradent.kernels.common.numerics`, or Triton's kernels where
    `gradent.kernels.dispatch.path` names them for the device.
    Flops are those of three full blocks, whatever a kernel saves by symmetry: what it saves is then in its price. No
    random number is drawn, no graph is made, and no rounding mode of the caller's is changed.

    Nothing is measured under a `TorchDispatchMode` (which would count or fake the operators), while a CUDA graph is
    captured, or within a budget that has no room for it: what is not known by then counts as 1.0, once.

    Args:
        device: where operands are.
        dtype: theirs.
        path: "torch" or "triton"; None for the one in use.
        budget: bytes that a measurement may take; None for no limit.

    Returns:
        A power of √2 from 1/4 to 4; 1.0 where memory or a busy machine did not allow to measure.
    """
    place = torch.device(device)
    path = _path(place, dtype) if path is None else path
    key = _key(place, dtype, path)
    if key in _known:
        return _known[key]
    with _lock:
        if key not in _known:
            found = _read().get(key)
            if found is None:
                cramped = budget is not None and budget < NEEDED.get(place.type, NEEDED["cuda"])
                if cramped or is_in_torch_dispatch_mode() or is_capturing(place):
                    return 1.0
                try:
                    ratio, calm = _measure(place, dtype, path)
                except torch.OutOfMemoryError:
                    ratio, calm = 1.0, False
                found = _round(ratio) if calm else 1.0
                if calm:
                    _write(key, found)
                else:
                    _unsure.add(key)
            _known[key] = found
    return _known[key]


def is_measured(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether what is known of the path in use on a device is a measurement, and not the 1 of a busy machine."""
    place = torch.device(device)
    key = _key(place, dtype, _path(place, dtype))
    return key in _known and key not in _unsure


def known() -> dict[str, float]:
    """The prices that this process goes by so far, each under its device, dtype, threads and path."""
    return dict(_known)


def adopt(prices: Mapping[str, float]) -> None:
    """Go by prices that another process, or an earlier one, went by: the same form then reduces the same layer.

    Args:
        prices: what `known` returned there.

    Raises:
        InputError: one of them is no price.
    """
    wrong = {key: value for key, value in prices.items() if not _is_price(value)}
    if wrong:
        raise InputError(f"{wrong}: no prices; each is a power of √2 from {LEAST_PRICE} to {MOST_PRICE}.")
    with _lock:
        _known.update(prices)


def cache_file() -> Path:
    """Where prices are kept between processes; the file need not be there."""
    given = os.environ.get("GRADENT_CACHE")
    if given:
        return Path(given) / "crossover.json"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "gradent" / "crossover.json"


def device_name(device: torch.device) -> str:
    """What a device calls itself: the processor's or the GPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_names: dict[torch.device, str] = {}


def _path(device: torch.device, dtype: torch.dtype) -> str:
    from gradent.kernels import dispatch  # noqa: PLC0415  (it stands on the reductions, which stand on this file)

    return dispatch.path(device, dtype).split()[0]


def _key(device: torch.device, dtype: torch.dtype, path: str) -> str:
    if device not in _names:
        _names[device] = device_name(device)
    kind = str(dtype).removeprefix("torch.")
    return f"{_names[device]}, {kind}, {torch.get_num_threads()} threads, torch {torch.__version__}, {path}"


def _round(ratio: float) -> float:
    """The nearest power of √2 between the least and the most price."""
    return float(min(MOST_PRICE, max(LEAST_PRICE, 2 ** (round(STEPS * math.log2(ratio)) / STEPS))))


@torch.no_grad()
def _measure(device: torch.device, dtype: torch.dtype, path: str) -> tuple[float, bool]:
    """Seconds a flop of gram over seconds a flop of outer, of the fastest rounds; and whether nothing disturbed it."""
    side = SIDE.get(device.type, SIDE["cuda"])
    length = side // 3  # ⅔h, where three full blocks of gram take as many flops as outer
    with torch.autocast(device.type, enabled=False):
        forms = _forms(path, _operands(length, side, device, dtype))
        seconds: tuple[list[float], list[float]] = ([], [])
        for form in forms:
            form()
        began, used = time.perf_counter(), time.process_time()
        while len(seconds[0]) < ROUNDS and (len(seconds[0]) < 2 or time.perf_counter() - began < SECONDS):
            for form, taken in zip(forms, seconds, strict=True):
                taken.append(_timed(form, device))
        share = (time.process_time() - used) / (time.perf_counter() - began) / torch.get_num_threads()
    gram, outer = (min(taken) for taken in seconds)
    calm = (device.type != "cpu" or share >= SHARE) and all(
        statistics.median(taken) <= CALM * min(taken) for taken in seconds
    )
    return (gram / (6 * length**2 * 2 * side)) / (outer / (4 * length * side**2)), calm


def _operands(length: int, side: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """u and v of both sides, `[length, side]`: fixed numbers between -1 and 1, none of them special."""
    count = torch.arange(length * side, dtype=torch.int32, device=device)
    drawn = ((count * step).remainder_(127).sub_(63) for step in (3, 5, 11, 13))
    return [numbers.to(dtype).div_(64).view(length, side) for numbers in drawn]


def _forms(path: str, operands: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Gram and outer as they are run on that path."""
    u_w, v_w, u_l, v_l = operands
    length, side = u_w.shape
    if path == "triton":
        from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415
        from gradent.kernels.gram.triton import gram_entries  # noqa: PLC0415  (imports Triton)
        from gradent.kernels.outer.triton import outer_entries  # noqa: PLC0415

        spans = Spans.of_pair(length, length)
        return lambda: gram_entries(u_w, v_w, u_l, v_l, spans), lambda: outer_entries(u_w, v_w, u_l, v_l, spans)
    from gradent.kernels.common.numerics import reduce_planned  # noqa: PLC0415  (it asks here for the price)

    narrow = u_w.dtype not in (torch.float32, torch.float64)
    gram = Plan(form="gram", tile=(length, length), depth=DEPTH if narrow else side, flops=0, scratch=0)
    outer = Plan(form="outer", tile=(side, side), depth=DEPTH if narrow else length, flops=0, scratch=0)
    return (
        lambda: reduce_planned(u_w, v_w, u_l, v_l, gram),
        lambda: reduce_planned(u_w, v_w, u_l, v_l, outer),
    )


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes: on a GPU what the device itself is busy with, without the Python that queues it."""
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    stream = torch.cuda.current_stream(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call, unused-ignore]
    function()
    first.record(stream)
    for _ in range(REPEATS):
        function()
    last.record(stream)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000 / REPEATS


def _read() -> dict[str, float]:
    """The prices in the cache file; none where it is missing, unreadable or not of this version."""
    try:
        content = json.loads(cache_file().read_bytes())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory
        return {}
    if (
        not isinstance(content, dict)
        or content.get("version") != VERSION
        or not isinstance(content.get("prices"), dict)
    ):
        return {}
    return {key: value for key, value in content["prices"].items() if _is_price(value)}


def _is_price(value: object) -> bool:
    return isinstance(value, float) and LEAST_PRICE <= value <= MOST_PRICE and value == _round(value)


def _write(key: str, value: float) -> None:
    """Add a price to the cache file; where it cannot be written, the process alone remembers it."""
    with contextlib.suppress(InputError, OSError, RuntimeError):
        prices = {**_read(), key: value}
        content = json.dumps({"version": VERSION, "prices": prices}, indent=2).encode()
        write_whole(cache_file(), lambda handle: handle.write(content))
