"""Reward Calibration, the baseline: the batch's mean balance of the two gradients, smoothed over steps.

Wu et al. 2026 ("Towards Disentangled Preference Optimization Dynamics") rebalance a margin loss by one factor a step,
`d_w -> α d_w` and `d_l -> d_l / α` with `α = exp(½ (log r* − log r))`: r is the loss's own `d_w/d_l`, and r* the middle
of the band between the two bounds of Condition 2, `⟨g_w, g_l⟩/‖g_w‖²` and `‖g_l‖²/⟨g_w, g_l⟩`, whose geometric mean is
`‖g_l‖/‖g_w‖`. Its logarithm is averaged over the batch, and over steps with smoothing 0.98. Pairwise normalization
takes the same ratio pair by pair, and of every step alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradent.losses.designs import counting, rebalanced_weights
from gradent.trainer.pairwise.row_norms import RowNorms
from gradent.trainer.pairwise.trainer import PairwiseNormalizedDPOTrainer

__all__ = ["RewardCalibratedDPOTrainer", "RewardCalibratedOnHeadDPOTrainer"]

SMOOTHING = 0.98


class RewardCalibratedDPOTrainer(PairwiseNormalizedDPOTrainer):
    """Norms over all trained parameters."""

    _mean, _weight = 0.0, 0.0  # of log r*: an average that corrects for its beginning, as Adam's moments are

    def reweigh(self, norms: RowNorms, d_w: Tensor, d_l: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both sides' weights times and divided by α.

        Args:
            norms: of the batch's pairs.
            d_w: weight of chosen's gradient.
            d_l: weight of rejected's.

        Returns:
            The new weights, and their mean.
        """
        both = torch.stack(counting(norms.chosen, norms.rejected)).all(0)
        if bool(both.any()):
            middle = float((norms.rejected[both] / norms.chosen[both]).log().mean())
            self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * middle
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        wanted = self._mean / self._weight if self._weight else 0.0
        chosen, rejected = rebalanced_weights(d_w, d_l, wanted)
        return chosen, rejected, (chosen + rejected) / 2


class RewardCalibratedOnHeadDPOTrainer(RewardCalibratedDPOTrainer):
    """Norms over the head alone, the proxy that is published for full fine-tuning."""

    def measured(self, model: nn.Module) -> Any:
        """The head's weight.

        Args:
            model: the policy.

        Returns:
            It, by name.
        """
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        return {name: each for name, each in model.named_parameters() if each is head.weight}
