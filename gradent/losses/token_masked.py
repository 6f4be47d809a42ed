"""Sparsity-regularised token masking, the paper's Section 5.2, as pure functions of log-probs and scores.

Every response token i has a score `u^i`; a token is kept where `u^i >= r`. The loss contrasts kept tokens alone,

    ℓ = -log σ( β Σ_i [ m_w^i log(π(y_w^i)/π_ref(y_w^i)) - m_l^i log(π(y_l^i)/π_ref(y_l^i)) ] ) + η (s_w + s_l)/2,

with the indicator `I{u >= r}`, or its approximation `m = σ(k(u - r))`, as the mask m. Where the paper leaves room:

- β is DPO's; the paper's formula has none (β = 1).
- The penalty is the mean of a response's mask (`s_w`, `s_l`), not its sum: it lies between 0 and 1 whatever the
  length, so that η means the same for short and long responses, and a batch's loss is the mean of its pairs' losses.

Letters: B pairs; N = 2B rows, rows 0..B-1 chosen and B..2B-1 rejected; K predicted tokens a row, of which `tokens`
marks those of the response.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradent.errors import InputError

__all__ = ["hard_mask", "masked_logps", "soft_mask", "sparsity", "token_masked_loss"]


def soft_mask(scores: Tensor, *, threshold: float, k: float) -> Tensor:
    """The smooth indicator `σ(k(u - r))`.

    Args:
        scores: u, any shape.
        threshold: r.
        k: its sharpness, > 0; the larger, the nearer to the indicator.

    Returns:
        The mask, between 0 and 1, of the scores' shape; above a half where `hard_mask` keeps.
    """
    return torch.sigmoid(k * (scores - threshold))


def hard_mask(scores: Tensor, *, threshold: float) -> Tensor:
    """The indicator `I{u >= r}`.

    Args:
        scores: u, any shape.
        threshold: r.

    Returns:
        bool, of the scores' shape.
    """
    return scores >= threshold


def masked_logps(policy: Tensor, reference: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kept log-probs of both models, in such a form that a loss of their difference has the mask's whole gradient.

    The reference's part carries no gradient, as losses expect of a reference. What the mask's gradient owes to it,
    `-log π_ref`, is in the policy's part, whose value it leaves as it is, bit by bit.

    Args:
        policy: `log π` of every token, `[N, K]`.
        reference: `log π_ref` of every token, `[N, K]`.
        mask: m, `[N, K]`.

    Returns:
        `(m log π, m log π_ref)`, `[N, K]` each. Of their difference the gradient is `m` by `log π` and
        `log π - log π_ref` by `m`.
    """
    kept = mask * reference
    return mask * policy - (kept - kept.detach()), kept.detach()


def sparsity(mask: Tensor, tokens: Tensor) -> Tensor:
    """The mean of every response's mask: its ℓ1 norm over its length.

    Args:
        mask: m >= 0, `[N, K]`.
        tokens: the response's tokens, bool `[N, K]`.

    Returns:
        `[N]`; 0 where a row has no token.
    """
    marks = tokens.to(mask.dtype)
    return (mask * marks).sum(1) / marks.sum(1).clamp_min(1)


def token_masked_loss(
    policy: Tensor,
    reference: Tensor,
    scores: Tensor,
    tokens: Tensor,
    *,
    beta: float,
    eta: float,
    threshold: float = 0.0,
    k: float = 1.0,
    hard: bool = False,
) -> Tensor:
    """The loss of every pair; see the head of this file.

    Args:
        policy: `log π` of every token, `[2B, K]`, chosen rows first.
        reference: `log π_ref` of every token, `[2B, K]`.
        scores: u, `[2B, K]`.
        tokens: the responses' tokens, bool `[2B, K]`; what stands elsewhere is not read.
        beta: β.
        eta: η, >= 0.
        threshold: r.
        k: sharpness of the soft mask.
        hard: take the indicator in its place; the loss then has no gradient by the scores.

    Returns:
        ℓ, `[B]`.

    Raises:
        InputError: shapes that differ, or an odd number of rows.
    """
    shapes = {str(list(tensor.shape)) for tensor in (policy, reference, scores, tokens)}
    if len(shapes) != 1 or policy.ndim != 2 or len(policy) % 2:
        raise InputError(
            f"token_masked_loss: received policy {list(policy.shape)}, reference {list(reference.shape)}, scores "
            f"{list(scores.shape)}, tokens {list(tokens.shape)}; accepted is one shape [2B, K] for all, B chosen rows "
            "before their B rejected ones."
        )
    is_kept = hard_mask(scores, threshold=threshold)
    mask = is_kept.to(policy.dtype) if hard else soft_mask(scores, threshold=threshold, k=k)
    mask, policy, reference = (values.where(tokens, 0.0) for values in (mask, policy, reference))
    kept, kept_reference = masked_logps(policy, reference, mask)
    chosen, rejected = (kept.sum(1) - kept_reference.sum(1)).chunk(2)
    share_w, share_l = sparsity(mask, tokens).chunk(2)
    return -logsigmoid(beta * (chosen - rejected)) + eta * (share_w + share_l) / 2
