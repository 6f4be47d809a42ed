"""The cheap stand-ins of a measured step's pairs, by a forward of gradent's own."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gradent.errors import GradentError
from gradent.model.sharding import sharding
from gradent.proxies import PairProxies, measure_proxies
from gradent.recorder.recording import Recording, RowRecording

__all__ = ["step_proxies"]


def step_proxies(
    model: nn.Module, recording: Recording | RowRecording, budget: int | str | None, say: Callable[..., object]
) -> PairProxies | None:
    """The stand-ins of a recording's pairs; None where there are none, which is said once."""
    reason, kind = None, sharding(model)
    if isinstance(recording, Recording) and recording.batch is None and not len(recording.gram):
        return None  # the loss moves no pair of this step
    if not isinstance(recording, Recording):
        reason = "they are of pairs, and these rows are none"
    elif kind is not None:
        reason = f"a model sharded by {kind} allows no pass of gradent's own"
    elif recording.batch is None:
        reason = "a reward model has no log-probs"
    else:
        try:
            return measure_proxies(model, recording.batch, memory_budget=budget)
        except GradentError as error:  # the step's record is not to be lost with its stand-ins
            reason = f"{type(error).__name__}: {error}"
    say(f"gradent takes no stand-ins (proxies=True): {reason}.")
    return None
