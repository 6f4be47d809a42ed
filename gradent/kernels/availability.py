"""Whether Triton's kernels are used on a device: asked once, and said once where they are not.

On a CUDA device they are used where Triton is installed and, once a device and process, their self-check succeeds.
`GRADENT_KERNELS` forces a path: `torch`, or `triton`, without a self-check (on a CPU by `TRITON_INTERPRET=1`, for
tests). Where a kernel has no room, or a CUDA graph is captured before the check, torch reduces as well.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from gradent.errors import InputError
from gradent.kernels.common.streams import is_capturing
from gradent.notices import Notices, warn

__all__ = ["VARIABLE", "announce_budget", "attempt", "device_name", "on_kernels", "path"]

T = TypeVar("T")

VARIABLE = "GRADENT_KERNELS"
NARROW = (torch.float32, torch.bfloat16, torch.float16)

MISSING = "Triton is not installed"
KEEP = f"{VARIABLE}=torch keeps torch without this warning"

_verdicts: dict[torch.device, str] = {}
"""Device -> why the kernels are not used on it, "" where they are."""

_notices = Notices(warn)
"""What was said of single reductions that kernels leave to torch."""


def path(device: torch.device | str, dtype: torch.dtype) -> str:
    """What reduces operands of a dtype on a device: "triton", or "torch" and why, as `torch (float64 operands)`.

    The first question about a CUDA device imports Triton and runs the self-check, which compiles (half a minute or so;
    little where Triton's cache has the kernels).
    """
    device = torch.device(device)
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "torch", "triton"):
        raise InputError(
            f"{VARIABLE}={forced!r}: accepted are 'torch' and 'triton'; leave it unset to let gradent choose."
        )
    if forced == "torch":
        return f"torch ({VARIABLE}=torch)"
    if dtype not in NARROW:
        return f"torch ({str(dtype).removeprefix('torch.')} operands)"
    if device.type != "cuda" and not forced:
        return f"torch (operands on the {device.type})"
    reason = _forced(device) if forced else _verdict(device)
    return f"torch ({reason})" if reason else "triton"


def on_kernels(*operands: Tensor) -> bool:
    """Whether kernels, not torch, reduce these operands, which lie on one device."""
    kinds = {(operand.device, operand.dtype) for operand in operands}
    return all(path(device, dtype) == "triton" for device, dtype in kinds)


def attempt(device: torch.device, launch: Callable[[], T]) -> T | None:
    """What kernels give, or None where they cannot be compiled or launched: torch is then to do it.

    The failure is announced, and `path` names torch for the device from then on; with `GRADENT_KERNELS=triton` it is
    raised. So is OutOfMemoryError, which says nothing about the kernels, also where Triton found no memory.
    """
    from gradent.kernels.self_check import BROKEN  # noqa: PLC0415  (imports Triton)

    try:
        return launch()
    except torch.OutOfMemoryError:
        raise
    except BROKEN as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        if os.environ.get(VARIABLE):
            raise
        _give_up(device, f"{type(error).__name__}: {str(error).strip() or 'without a message'}")
        return None


def announce_budget(device: torch.device, needed: int, budget: int) -> None:
    """Say, once a device, that torch reduces what the kernels, which need so many bytes, have no room for."""
    reason = f"the kernels would hold {needed:,} bytes for some products, and memory_budget is {budget:,}"
    _notices.once(_left(device, reason, "give a larger memory_budget"), key=device)


def _forced(device: torch.device) -> str:
    """No reason against kernels, "", where `GRADENT_KERNELS=triton` can be followed; an error elsewhere."""
    if importlib.util.find_spec("triton") is None:
        raise InputError(f"{VARIABLE}=triton, but Triton is not installed: pip install 'gradent[cuda]'.")
    from gradent.kernels.common.triton_tiles import INTERPRETED  # noqa: PLC0415  (imports Triton)

    if device.type != "cuda" and not INTERPRETED:
        raise InputError(
            f"{VARIABLE}=triton, but the operands are on the {device.type}, where only Triton's interpreter runs: set "
            f"TRITON_INTERPRET=1 before Python starts, or unset {VARIABLE}."
        )
    return ""


def _verdict(device: torch.device) -> str:
    """Why a CUDA device does without the kernels, "" if it does not; found out and announced once."""
    if device == torch.device(device.type):  # without a number
        device = torch.device(device.type, torch.cuda.current_device())
    if device not in _verdicts:
        if is_capturing(device):  # a check waits for the device, which ends the capture
            reason = "a CUDA graph is captured before the kernels were checked"
            _notices.once(_left(device, reason, f"measure once before the capture; {KEEP}"))
            return reason
        reason = _examine(device)
        if reason:
            _give_up(device, reason)
        else:
            _verdicts[device] = ""
    return _verdicts[device]


def _examine(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return MISSING
    try:
        from gradent.kernels.self_check import self_check  # noqa: PLC0415  (imports Triton)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    wrong = self_check(device)
    return f"the kernels' self-check failed: {wrong}" if wrong else ""


def _give_up(device: torch.device, reason: str) -> None:
    _verdicts[device] = reason
    remedy = (
        "pip install 'gradent[cuda]'"
        if reason == MISSING
        else "pip install --upgrade 'gradent[cuda]', or report it with this message"
    )
    warn(_left(device, reason, f"{remedy}; {KEEP}"))


def _left(device: torch.device, reason: str, remedy: str) -> str:
    return (
        f"Gradients on {device} are reduced in plain torch, not by gradent's kernels: {reason}. Results are the same, "
        f"later. What to do: {remedy}."
    )


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
