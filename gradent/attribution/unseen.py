"""What a step does to a pair that is not in its batch: the leave-one-out estimate, from the account of the batch.

No row of the batch belongs to an unseen pair, so that each response's change without the part of its own pair is one
look at what the step does to such a pair. Of K pairs, K − 1 are left to push, hence the factor K / (K − 1).

Letters: k pairs, N = 2k rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradent.attribution.step import StepAttribution

__all__ = ["estimate_unseen", "unseen_changes"]


def estimate_unseen(account: StepAttribution) -> Tensor | None:
    """First-order change of an unseen pair's chosen and rejected, nats, each with its standard error, float64 `[2, 2]`.

    Args:
        account: of a whole step, of k pairs.

    Returns:
        `[[chosen, its error], [rejected, its error]]`, the error from the spread over the pairs; None where not all of
        the step is in the account, where it is not split into sources, and of fewer than two pairs.
    """
    looks = unseen_changes(account)
    return None if looks is None else torch.stack([looks.mean(1), looks.std(1) / math.sqrt(looks.shape[1])], 1)


def unseen_changes(account: StepAttribution) -> Tensor | None:
    """Each pair's look at an unseen one, chosen and rejected, nats, float64 `[2, k]`; None as `estimate_unseen`."""
    moved, pairs = account.moved, len(account.total) // 2
    if not account.is_whole or "others_chosen" not in moved or pairs < 2:
        return None
    others = moved["others_chosen"] + moved["others_rejected"] + moved["earlier_batches"]
    carried = moved["momentum"] + moved["weight_decay"]
    return (others * pairs / (pairs - 1) + carried).view(2, pairs)
