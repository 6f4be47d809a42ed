"""A device whose work is queued: what may be asked of it, and sent to it, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_once", "is_capturing", "sent"]

AT_ONCE = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
"""Bytes of what is made only to be looked at, by the type of device."""


def at_once(device: torch.device) -> int:
    """How much of something large is made at once where each part is looked at, and let go of.

    Args:
        device: where it is.

    Returns:
        Bytes: of a CPU's caches; of as much on a GPU that the calls, each of which launches a kernel, are few.
    """
    return AT_ONCE.get(device.type, AT_ONCE["cuda"])


def is_capturing(device: torch.device) -> bool:
    """Whether what is queued now is captured for a CUDA graph: waiting for the device would end that.

    Args:
        device: any.

    Returns:
        The answer.
    """
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device; from the CPU to a GPU without waiting until it is there.

    Args:
        tensor: any.
        device: where to.

    Returns:
        The tensor itself where it is there already.
    """
    if tensor.device.type == "cpu" and device.type == "cuda" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
