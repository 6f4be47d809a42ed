"""Inside a Hugging Face trainer: the callback that measures, logs and keeps what it measured; and two trainers.

`PairwiseNormalizedDPOTrainer` and `TokenMaskedDPOTrainer`, the designs of the paper's Section 5, need TRL, which is
imported when one is asked for. `adaptive_nll` is an experiment, and no part of what is promised.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradent.trainer.callback.callback import EntanglementCallback
from gradent.trainer.records.row_step import RowStepRecord
from gradent.trainer.records.step import StepRecord

if TYPE_CHECKING:
    from gradent.trainer.pairwise.config import PairwiseNormalizedDPOConfig
    from gradent.trainer.pairwise.trainer import PairwiseNormalizedDPOTrainer
    from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
    from gradent.trainer.token_masking.trainer import TokenMaskedDPOTrainer

__all__ = [
    "EntanglementCallback", "PairwiseNormalizedDPOConfig", "PairwiseNormalizedDPOTrainer", "RowStepRecord",
    "StepRecord", "TokenMaskedDPOConfig", "TokenMaskedDPOTrainer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "pairwise" if name.startswith("Pairwise") else "token_masking"
    return getattr(import_module(f"gradent.trainer.{room}.trainer"), name)
