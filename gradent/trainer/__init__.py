"""Inside a Hugging Face trainer: the callback that measures, logs and keeps what it measured."""

from gradent.trainer.callback import EntanglementCallback
from gradent.trainer.step import StepRecord

__all__ = ["EntanglementCallback", "StepRecord"]
