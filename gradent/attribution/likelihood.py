"""What a likelihood term on chosen would do in a step, and how much of it would have been enough.

Margin losses are often given a term `λ · NLL`, the mean over the batch's chosen tokens of `−log π` (`rpo_alpha`, the
"sft" of TRL's `loss_type`, CPO's `cpo_alpha`). Its gradient is one of the chosen rows alone, so that the account of a
step knows what it would do: of k chosen rows with `T` tokens together, row j's gradient enters with `−λ / T` beside the
loss's own `−d_w / k`.

Letters: k pairs, N = 2k rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradent.attribution.step import StepAttribution
from gradent.attribution.unseen import unseen_changes

__all__ = ["NLLEffect", "estimate_nll", "needed_weight"]


@dataclass(frozen=True, kw_only=True)
class NLLEffect:
    """What a step does, and what a likelihood term of weight 1 on chosen would add to it; first order, nats.

    Attributes:
        fresh: mean change of the log-probs that the step's own gradient makes, float64 `[2, 2]`: of the batch's own
            pairs and of a pair that is not in it, each of chosen and of rejected.
        carried: what momentum and weight decay do, in the same layout.
        gain: what a term of weight 1 would add in this step, in the same layout.
        error: standard error of chosen's mean change, from the spread over the pairs, float64 `[2]`: of the batch's own
            pairs and of a pair that is not in it.
        lasting: a term that has been there since the run began acts through momentum too; its whole effect in a step is
            `gain · lasting`.
    """

    fresh: Tensor
    carried: Tensor
    gain: Tensor
    error: Tensor
    lasting: float

    @property
    def change(self) -> Tensor:
        """All that the step does, in the layout of `fresh`."""
        return self.fresh + self.carried

    def without_unseen(self) -> NLLEffect:
        """The same, where nothing is known of a pair that is not in the batch: nan for it."""
        unknown = torch.tensor([[0.0], [torch.nan]], dtype=torch.float64)
        return replace(self, fresh=self.fresh + unknown, gain=self.gain + unknown)


def estimate_nll(account: StepAttribution, d_w: Tensor, lengths: Tensor) -> NLLEffect | None:
    """The effect of a likelihood term in a step of k pairs, all of them active.

    Args:
        account: of the whole step.
        d_w: the loss's weight of each pair's chosen response, `[k]`.
        lengths: tokens of each chosen response, `[k]`.

    Returns:
        The effect; None where the account is not of the whole step or not split into its rows, where a row's weight
        is 0 or not the same for all of its tokens (`account.lasting` is None), and where a row has met no other pair.
    """
    pairs, pushes = len(d_w), account.pushes
    changes = unseen_changes(account)
    if changes is None or account.lasting is None or pushes.shape != (2 * pairs, 2 * pairs):
        return None
    if not bool(d_w.all()):
        return None
    units = (pushes[:, :pairs] / (d_w * lengths.double().mean())).view(2, pairs, pairs)
    own = units.diagonal(dim1=1, dim2=2)
    # Rows of different ranks may not have met (nan): those that did stand for them.
    others = units.masked_fill(torch.eye(pairs, dtype=torch.bool), torch.nan).nanmean(2) * pairs
    gains = own + others * (pairs - 1) / pairs
    if not bool(gains.isfinite().all()):
        return None
    carried = account.moved["momentum"] + account.moved["weight_decay"]
    means = [each.reshape(2, pairs).mean(1) for each in (account.total, changes.flatten(), carried, gains, others)]
    total, unseen, kept, *gained = means
    looks = torch.stack([account.total[:pairs], changes[0]])
    return NLLEffect(
        fresh=torch.stack([total - kept, unseen - kept]), carried=torch.stack([kept, kept]), gain=torch.stack(gained),
        error=looks.std(1) / math.sqrt(pairs), lasting=account.lasting,
    )  # fmt: skip


def needed_weight(effects: Sequence[NLLEffect], *, unseen: bool, throughout: bool = True) -> tuple[float, float]:
    """The smallest λ with which the chosen responses of some steps would not have fallen, summed over the steps.

    Args:
        effects: of the steps.
        unseen: of a pair that is not in the batch, in place of the batch's own.
        throughout: with a term that has been there since the run began; else one of these steps alone.

    Returns:
        λ and its standard error, from that of the changes; λ is 0 where chosen does not fall, nan where the term does
        not raise it, and where nothing is known.
    """
    place = int(unseen)
    change = sum(float(effect.change[place, 0]) for effect in effects)
    gain = sum(float(effect.gain[place, 0]) * (effect.lasting if throughout else 1.0) for effect in effects)
    error = math.sqrt(sum(float(effect.error[place]) ** 2 for effect in effects))
    if not gain > 0:
        return (0.0 if change >= 0 else math.nan), math.nan
    return (0.0 if change >= 0 else -change / gain), error / gain
