"""Inside a Hugging Face trainer: the callback that measures, logs and keeps what it measured; and three trainers.

`AdaptiveNLLDPOTrainer`, and the designs of the paper's Section 5, `PairwiseNormalizedDPOTrainer` and
`TokenMaskedDPOTrainer`, need TRL, which is imported when one is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradent.trainer.callback.callback import EntanglementCallback
from gradent.trainer.records.row_step import RowStepRecord
from gradent.trainer.records.step import StepRecord

if TYPE_CHECKING:
    from gradent.trainer.adaptive_nll.config import AdaptiveNLLDPOConfig
    from gradent.trainer.adaptive_nll.trainer import AdaptiveNLLDPOTrainer
    from gradent.trainer.pairwise.config import PairwiseNormalizedDPOConfig
    from gradent.trainer.pairwise.trainer import PairwiseNormalizedDPOTrainer
    from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
    from gradent.trainer.token_masking.trainer import TokenMaskedDPOTrainer

__all__ = [
    "AdaptiveNLLDPOConfig", "AdaptiveNLLDPOTrainer", "EntanglementCallback", "PairwiseNormalizedDPOConfig",
    "PairwiseNormalizedDPOTrainer", "RowStepRecord", "StepRecord", "TokenMaskedDPOConfig", "TokenMaskedDPOTrainer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    rooms = {"Adaptive": "adaptive_nll", "Pairwise": "pairwise", "TokenMas": "token_masking"}
    room = rooms[name[:8]]
    return getattr(import_module(f"gradent.trainer.{room}.trainer"), name)
