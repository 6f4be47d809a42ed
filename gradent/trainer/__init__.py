"""Inside a Hugging Face trainer: the callback that measures, logs and keeps what it measured; and two trainers.

`PairwiseNormalizedDPOTrainer` and `TokenMaskedDPOTrainer`, the designs of the paper's Section 5, need TRL, which is
imported when one is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradent.trainer.callback.callback import EntanglementCallback
from gradent.trainer.callback.step import StepRecord

if TYPE_CHECKING:
    from gradent.trainer.pairwise.config import PairwiseNormalizedDPOConfig
    from gradent.trainer.pairwise.trainer import PairwiseNormalizedDPOTrainer
    from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
    from gradent.trainer.token_masking.trainer import TokenMaskedDPOTrainer

__all__ = [
    "EntanglementCallback", "PairwiseNormalizedDPOConfig", "PairwiseNormalizedDPOTrainer", "StepRecord",
    "TokenMaskedDPOConfig", "TokenMaskedDPOTrainer",
]  # fmt: skip


_NEED_TRL = {
    "PairwiseNormalizedDPOConfig": "gradent.trainer.pairwise.trainer",
    "PairwiseNormalizedDPOTrainer": "gradent.trainer.pairwise.trainer",
    "TokenMaskedDPOConfig": "gradent.trainer.token_masking.trainer",
    "TokenMaskedDPOTrainer": "gradent.trainer.token_masking.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_TRL:
        return getattr(import_module(_NEED_TRL[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
