"""The objects that are calling: a trainer does not pass itself to its callbacks, so it is found among the callers.

A place at the front of the callbacks is needed so that what is added to the logs is there when others write them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["divides_loss", "find_trainer", "move_to_front", "on_broken_step"]

T = TypeVar("T")

_DEPTH = 40
"""Frames that are looked through: an engine that steps has some 20 of its own below the trainer's."""


def _callers(kind: type[T]) -> Iterator[tuple[FrameType, T]]:
    """Frames of methods of a class that are running now, the nearest first, with their objects."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  (the documented way to the calling functions)
    for _ in range(_DEPTH):
        if frame is None:
            return
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):
            yield frame, caller
        frame = frame.f_back


def _trainer_class() -> type[Trainer]:
    from transformers import Trainer  # noqa: PLC0415  (imports datasets; where it is asked for it is loaded already)

    return Trainer


def find_trainer() -> Trainer | None:
    """The trainer that is calling, or None."""
    return next((trainer for _, trainer in _callers(_trainer_class())), None)


def divides_loss() -> bool:
    """Whether the trainer that is calling divides a micro-batch's loss by the number of micro-batches of the step."""
    for frame, trainer in _callers(_trainer_class()):
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if is_scaled is not None:
            return not is_scaled
        if "num_items_in_batch" in frame.f_locals:  # then the loss may be a mean over the labels of the whole step
            has_count = frame.f_locals["num_items_in_batch"] is not None
            accepts = bool(getattr(trainer, "model_accepts_loss_kwargs", False))
            return getattr(trainer, "compute_loss_func", None) is None and not (accepts and has_count)
    return True


def move_to_front(callback: TrainerCallback) -> None:
    """Move a callback to the front of the handler that is calling it just now."""
    # A trainer calls its loggers (wandb, TensorBoard, trackio) before the callbacks that a user passed.
    handler = next((handler for _, handler in _callers(CallbackHandler)), None)
    if handler is not None and callback in handler.callbacks:
        # The handler may be walking this list: what it has yet to call stays where it is.
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)


def on_broken_step(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Call where the trainer's training step raises (Ctrl-C, out of memory); what takes this off the trainer again."""
    # No event tells a callback of it. An attribute of this one object, so that other trainers are as they were.
    original, own = trainer.training_step, vars(trainer).get("training_step")

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException:
            call()
            raise

    def take_off() -> None:
        if vars(trainer).get("training_step") is training_step:
            del vars(trainer)["training_step"]
            if own is not None:
                vars(trainer)["training_step"] = own

    vars(trainer)["training_step"] = training_step
    return take_off
