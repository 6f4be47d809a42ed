"""A place at the front of a trainer's callbacks, so that what is added to the logs is there when others write them."""

from __future__ import annotations

import sys
from types import FrameType

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

__all__ = ["move_to_front"]

_DEPTH = 8


def move_to_front(callback: TrainerCallback) -> bool:
    """Move a callback to the front of the handler that is calling it just now.

    A trainer calls its loggers (wandb, TensorBoard, trackio) before the callbacks that a user passed, and does not tell
    a callback who calls it; the handler is found among the calling functions.

    Args:
        callback: the callback, called from inside an event.

    Returns:
        Whether it is at the front now.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  (the documented way to the calling functions)
    for _ in range(_DEPTH):
        if frame is None:
            break
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # The handler may be walking this list: what it has yet to call stays where it is.
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return True
        frame = frame.f_back
    return False
