"""A callback must never harm the run that it observes: its errors are logged, and then it steps aside."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any

import torch

from gradent.errors import GradentError
from gradent.notices import log

__all__ = ["LIMIT", "guarded_event"]

LIMIT = 3
"""Errors after which the callback leaves the run alone."""

_MORE_MEMORY = "Give EntanglementCallback a smaller memory_budget, or train in smaller, accumulated batches."
_OTHER_WAYS = "EntanglementCallback(on_error='raise') stops here instead; mode='measure' measures in another way."


def guarded_event(event: Callable[..., None]) -> Callable[..., None]:
    """Decorator of an event handler: its errors are logged, each once, unless `on_error="raise"`."""

    # The handler goes on being called and looks at `errors` itself: on several ranks some must meet the other ranks.
    @functools.wraps(event)
    def handler(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            event(self, *args, **kwargs)
        except Exception as error:
            self.step_aside()
            if self.on_error == "raise":
                self.leave()
                raise
            self.errors += 1
            summary = f"{type(error).__name__}: {error}"
            text = f"gradent failed in {event.__name__}, and training is not affected: {summary}"
            if not isinstance(error, GradentError):  # which says itself what to do
                remedy = _MORE_MEMORY if isinstance(error, torch.OutOfMemoryError) else _OTHER_WAYS
                text = f"{text} -- {remedy}\n{''.join(traceback.format_exception(error))}"
            self.notices.once(text, key=summary)
            if self.errors == LIMIT:
                log(f"gradent has failed {LIMIT} times and leaves this run alone from here on.")

    return handler
