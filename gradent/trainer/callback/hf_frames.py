"""Who is calling: a trainer does not tell its callbacks, so it is found among the calling functions.

A place at the front of the callbacks is needed so that what is added to the logs is there when others write them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["divides_loss", "find_caller", "find_trainer", "move_to_front"]

T = TypeVar("T")

_DEPTH = 12


def find_caller(kind: type[T]) -> T | None:
    """The nearest object of a class whose method is running now.

    Args:
        kind: the class.

    Returns:
        The object, or None where no such method is among the callers.
    """
    return next((found for _, found in _callers(kind)), None)


def _trainer_class() -> type[Trainer]:
    from transformers import Trainer  # noqa: PLC0415  (imports datasets; where it is asked for it is loaded already)

    return Trainer


def find_trainer() -> Trainer | None:
    """The trainer that is calling, or None."""
    return find_caller(_trainer_class())


def _callers(kind: type[T]) -> Iterator[tuple[FrameType, T]]:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  (the documented way to the calling functions)
    for _ in range(_DEPTH):
        if frame is None:
            return
        found = frame.f_locals.get("self")
        if isinstance(found, kind):
            yield frame, found
        frame = frame.f_back


def divides_loss() -> bool:
    """Whether the trainer that is calling divides a micro-batch's loss by the number of micro-batches of the step.

    Returns:
        True, unless the loss is one that is normalized already: by its own account, or by the number of labels.
    """
    for frame, trainer in _callers(_trainer_class()):
        declared = getattr(trainer, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return not declared
        if "num_items_in_batch" in frame.f_locals:
            counted = frame.f_locals["num_items_in_batch"] is not None
            accepts = bool(getattr(trainer, "model_accepts_loss_kwargs", False))
            return getattr(trainer, "compute_loss_func", None) is None and not (accepts and counted)
    return True


def move_to_front(callback: TrainerCallback) -> bool:
    """Move a callback to the front of the handler that is calling it just now.

    A trainer calls its loggers (wandb, TensorBoard, trackio) before the callbacks that a user passed.

    Args:
        callback: the callback, called from inside an event.

    Returns:
        Whether it is at the front now.
    """
    handler = find_caller(CallbackHandler)
    if handler is None or callback not in handler.callbacks:
        return False
    # The handler may be walking this list: what it has yet to call stays where it is.
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)
    return True
