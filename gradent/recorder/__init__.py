"""Measuring inside a training loop: `attach(model)`, `Recorder.harvest()`, and the recordings that it gives."""

from gradent.recorder.recorder import (
    CHOICES,
    NO_CONTRAST,
    Mode,
    Recorder,
    WeightGrad,
    attach,
    check_choices,
)
from gradent.recorder.recording import (
    Recording,
    RowRecording,
    join_recordings,
    join_row_recordings,
    with_account,
)

__all__ = [
    "CHOICES", "NO_CONTRAST", "Mode", "Recorder", "Recording", "RowRecording", "WeightGrad", "attach", "check_choices",
    "join_recordings", "join_row_recordings", "with_account",
]  # fmt: skip
