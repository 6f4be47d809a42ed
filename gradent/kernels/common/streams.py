"""A device whose work is queued: what may be asked of it, and sent to it, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_once", "is_capturing", "sent"]

AT_ONCE = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
"""Bytes of what is made only to be looked at, by the type of device."""


def at_once(device: torch.device) -> int:
    """Bytes of what is made at once to be looked at alone: a CPU's caches; so much on a GPU that the calls are few."""
    return AT_ONCE.get(device.type, AT_ONCE["cuda"])


def is_capturing(device: torch.device) -> bool:
    """Whether what is queued now is captured for a CUDA graph: waiting for the device would end that."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device, itself if it is there; from the CPU to a GPU without waiting until it has come."""
    if tensor.device.type == "cpu" and device.type == "cuda" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
