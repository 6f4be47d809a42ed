"""The paper's Section 4 in closed form: Theorem 1, Corollary 2 and Theorem 3.

Letters: V vocabulary, d hidden size, T tokens of a response (L where both have the same number), M tokens that the
prediction is uniform over. Row t of a `[T, ...]` tensor belongs to the t-th response token: `hidden[t]` is the state
that predicts it and `probs[t]` the distribution it is drawn from, so for causal models both sit one position to its
left. All results are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradent.errors import InputError

__all__ = ["Entries", "TokenChanges", "corollary_2", "head_gram", "theorem_1", "theorem_3"]

PROBABILITY_TOLERANCE = 1e-4
"""How far a row of probabilities may be from summing to 1 (a float16 softmax is within it, a row of logits is not)."""


class Entries(NamedTuple):
    """Gram entries of one pair, each a float64 scalar tensor.

    Attributes:
        chosen_sq: `‖∇log π(y_w|x)‖²`.
        rejected_sq: `‖∇log π(y_l|x)‖²`.
        inner: `⟨∇log π(y_w|x), ∇log π(y_l|x)⟩`.
    """

    chosen_sq: Tensor
    rejected_sq: Tensor
    inner: Tensor


class TokenChanges(NamedTuple):
    """First-order change of each token's log-prob, nats, float64 `[L]`.

    Attributes:
        chosen: of `log π(y_w^i | x, y_w^{<i})`.
        rejected: of `log π(y_l^i | x, y_l^{<i})`.
    """

    chosen: Tensor
    rejected: Tensor


def head_gram(
    chosen_hidden: Tensor,
    chosen_probs: Tensor,
    chosen_ids: Tensor,
    rejected_hidden: Tensor,
    rejected_probs: Tensor,
    rejected_ids: Tensor,
) -> Entries:
    """Gram entries with respect to a softmax head without bias, `π = s(hᵀθ)`, whatever the model beneath it.

    `⟨∇log π(y_w), ∇log π(y_l)⟩ = Σ_{t,s} (h_t·h_s) ((e_{y_t} - s_t)·(e_{y_s} - s_s))`, since a token's gradient is the
    outer product of its hidden state and its residual. Model Setup 1, without the theorems' further assumptions. It
    is the whole Gram where the head alone is trainable. Memory: `[T_w, T_l]` and the residuals, `[T, V]`.

    Args:
        chosen_hidden: hidden states that predict chosen's tokens, `[T_w, d]`.
        chosen_probs: softmax rows that predict them, `[T_w, V]`.
        chosen_ids: chosen's token ids, `[T_w]`.
        rejected_hidden: as `chosen_hidden`, for rejected, `[T_l, d]`.
        rejected_probs: as `chosen_probs`, `[T_l, V]`.
        rejected_ids: as `chosen_ids`, `[T_l]`.

    Returns:
        The three entries.

    Raises:
        InputError: shapes that do not fit together, a row that is no probability distribution, an id outside V.
    """
    chosen = _states("chosen_hidden", chosen_hidden), _residuals("chosen", chosen_probs, chosen_ids)
    rejected = _states("rejected_hidden", rejected_hidden), _residuals("rejected", rejected_probs, rejected_ids)
    for side, (states, residuals) in (("chosen", chosen), ("rejected", rejected)):
        if len(states) != len(residuals):
            raise InputError(f"{side}_hidden has {len(states)} rows but {side}_probs has {len(residuals)}.")
    if chosen[0].shape[1] != rejected[0].shape[1] or chosen[1].shape[1] != rejected[1].shape[1]:
        raise InputError(
            f"chosen has d={chosen[0].shape[1]}, V={chosen[1].shape[1]} but rejected has d={rejected[0].shape[1]}, "
            f"V={rejected[1].shape[1]}; both must come from one head."
        )
    return Entries(_head_inner(chosen, chosen), _head_inner(rejected, rejected), _head_inner(chosen, rejected))


def theorem_1(hidden: Tensor, support: int) -> Entries:
    """Gram entries of two different one-token responses under a uniform prediction (Theorem 1).

    `⟨g_w, g_l⟩ = -‖h‖²/M` and `‖g_w‖² = ‖g_l‖² = ((M-1)/M)‖h‖²`: the inner product is negative, so under any loss
    with positive weights chosen rises and rejected falls. Model Setup 1 (frozen hidden states, a learnable head
    without bias), Data Setup 1; both tokens are among the M. Checked: the statement is right as printed. (Its proof
    calls the entries of `s` logits; they are the probabilities.)

    Args:
        hidden: hidden state of the prompt's last token, `[d]`.
        support: M >= 2, how many tokens the prediction is uniform over.

    Returns:
        The three entries.

    Raises:
        InputError: `hidden` is not a vector, or `support` is under 2 (two different tokens must be in it).

    Example:
        >>> theorem_1(torch.ones(4), support=8).inner.item()
        -0.5
    """
    if hidden.ndim != 1:
        raise InputError(f"theorem_1: hidden has shape {list(hidden.shape)}; accepted is one state, [d].")
    if support < 2:
        raise InputError(f"theorem_1: support is {support}; it must hold both tokens, so at least 2.")
    square = hidden.to(torch.float64).square().sum()
    norm = square * (support - 1) / support
    return Entries(norm, norm.clone(), -square / support)


def corollary_2(
    hidden: Tensor, prefix_probs: Tensor, prefix_ids: Tensor, chosen_id: int, rejected_id: int, support: Tensor
) -> Entries:
    """Gram entries of two responses that differ at their last token alone, predicted uniformly there (Corollary 2).

    With `r_t = e_{y_t} - s_t` the residuals of the shared prefix, `P = Σ_{t,s<L} (h_t·h_s)(r_t·r_s)` its own Gram and
    `C_v = Σ_{t<L} (h_t·h_L)(r_t[v] - mean_{j in support} r_t[j])` its cross term with last token v:
    `‖g_w‖² = P + 2C_w + ((M-1)/M)‖h_L‖²`, `‖g_l‖² = P + 2C_l + ((M-1)/M)‖h_L‖²`, and
    `⟨g_w,g_l⟩ = P + C_w + C_l - ‖h_L‖²/M`.

    The paper's statement, `⟨g_w,g_l⟩ <= ‖g_w‖² = ‖g_l‖²`, does not follow from its assumptions: with `D = C_w - C_l =
    Σ_{t<L} (h_t·h_L)(r_t[w] - r_t[l])` the norms differ by 2D, and `‖g_w‖² - ⟨g_w,g_l⟩ = ‖h_L‖² + D`,
    `‖g_l‖² - ⟨g_w,g_l⟩ = ‖h_L‖² - D`. So Condition 1 holds exactly when `|D| <= ‖h_L‖²`, whatever M is. It fails, for
    example, where the prefix repeats the rejected token in states like `h_L` (then D < -‖h_L‖², and chosen falls). The
    printed equality needs D = 0: a prefix that neither contains nor predicts one of the two last tokens more than
    the other, or one predicted perfectly (`r_t = 0`, which is Theorem 1 again).

    Args:
        hidden: hidden states that predict the L response tokens, `[L, d]`; the last is `h_L`.
        prefix_probs: softmax rows that predict the L-1 shared tokens, `[L-1, V]`.
        prefix_ids: the shared tokens, `[L-1]`.
        chosen_id: chosen's last token.
        rejected_id: rejected's last token, a different one.
        support: ids of the M tokens that the last prediction is uniform over, `[M]`, with both last tokens.

    Returns:
        The three entries.

    Raises:
        InputError: shapes that do not fit together, a row that is no probability distribution, equal last tokens, or
            a support that repeats a token or lacks one of the last tokens.
    """
    states, residuals = _states("hidden", hidden), _residuals("prefix", prefix_probs, prefix_ids)
    if len(states) != len(residuals) + 1:
        raise InputError(
            f"corollary_2: hidden has {len(states)} rows and prefix_probs {len(residuals)}; there must be one state "
            "more than prefix tokens, the last one predicting the differing token."
        )
    tokens = support.flatten().tolist()
    if chosen_id == rejected_id or len(set(tokens)) != len(tokens) or not {chosen_id, rejected_id} <= set(tokens):
        raise InputError(
            f"corollary_2: last tokens {chosen_id} and {rejected_id} with support {tokens[:8]} (M={len(tokens)}); "
            "accepted are two different tokens, both in a support without repeats."
        )
    last, prefix = states[-1], (states[:-1], residuals)
    overlap = states[:-1] @ last
    deviations = residuals - residuals[:, support].mean(1, keepdim=True)
    cross_w, cross_l = overlap @ deviations[:, chosen_id], overlap @ deviations[:, rejected_id]
    shared, final = _head_inner(prefix, prefix), theorem_1(last, len(tokens))
    return Entries(
        shared + 2 * cross_w + final.chosen_sq,
        shared + 2 * cross_l + final.rejected_sq,
        shared + cross_w + cross_l + final.inner,
    )


def theorem_3(
    chosen_probs: Tensor, rejected_probs: Tensor, chosen_ids: Tensor, rejected_ids: Tensor, *, scale: float = 1.0
) -> TokenChanges:
    """First-order change of every token's log-prob after one DPO step on learnable logits (Theorem 3).

    The responses differ at one position m. For chosen, times `scale`: 0 before m (12); at m, `1 - s_m[j] + s_m[k]`
    with j chosen's and k rejected's token there; after m, with j the shared token,
    `(1 - s_w[j])(s_l[j] - s_w[j]) - Σ_{v≠j} s_w[v](s_l[v] - s_w[v])` (14). For rejected the same derivation gives 0,
    `-(1 + s_m[j] - s_m[k])` and `(1 - s_l[j])(s_l[j] - s_w[j]) - Σ_{v≠j} s_l[v](s_l[v] - s_w[v])`. Under the
    assumption of Pal et al., `s_w[j] >= s_l[j]` and `s_w[v] <= s_l[v]` elsewhere, everything after m is <= 0.

    Equation (13) prints `1 + (s_m[j] - s_m[k])`, with the two probabilities exchanged; the last line of its own proof,
    (22), has the form above, which autograd confirms. Both are >= 0.

    What the learnable logits are: (14) takes chosen's and rejected's gradients at position i as vectors of one space,
    so row i of the logits is one parameter used by both responses, with softmax rows that differ through something
    frozen that depends on the prefix. If rows of different prefixes were separate parameters, nothing after m would be
    entangled and chosen would rise there, by `‖e_j - s_w‖²`.

    Args:
        chosen_probs: softmax rows that predict chosen's tokens, `[L, V]`.
        rejected_probs: softmax rows that predict rejected's tokens, `[L, V]`, equal to chosen's up to position m.
        chosen_ids: chosen's tokens, `[L]`.
        rejected_ids: rejected's tokens, `[L]`, different at exactly one position (Data Setup 2; m = L is accepted).
        scale: `C = η d` of the step, with `d = d_w = d_l` the loss's weight (DPO: `η β σ(-βΔ)`); the paper sets it
            to 1. Give 1 for changes per unit step and weight.

    Returns:
        The changes, `[L]` each; their sums are the first-order changes of the two sentences' log-probs.

    Raises:
        InputError: shapes differ, a row is no probability distribution, the responses do not differ at exactly one
            position, or the distributions differ before their prefixes do.
    """
    chosen = _residuals("chosen", chosen_probs, chosen_ids)
    rejected = _residuals("rejected", rejected_probs, rejected_ids)
    if chosen.shape != rejected.shape:
        raise InputError(
            f"theorem_3: chosen_probs has shape {list(chosen.shape)} and rejected_probs {list(rejected.shape)}; both "
            "responses must have L tokens over one vocabulary."
        )
    differing = (chosen_ids != rejected_ids).nonzero().flatten().tolist()
    if len(differing) != 1:
        raise InputError(
            f"theorem_3: the responses differ at {len(differing)} positions; accepted is exactly one (Data Setup 2)."
        )
    shared = slice(0, differing[0] + 1)
    if not torch.allclose(chosen_probs[shared], rejected_probs[shared], atol=PROBABILITY_TOLERANCE):
        raise InputError(
            f"theorem_3: the two responses share their prefix up to position {differing[0]} (from 0), so their "
            "softmax rows must be equal up to there; they are not."
        )
    # ⟨residual, residual_w - residual_l⟩: equations (12) to (14) are this one product, written out case by case.
    difference = chosen - rejected
    return TokenChanges(scale * (chosen * difference).sum(1), scale * (rejected * difference).sum(1))


def _head_inner(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    return ((left[0] @ right[0].T) * (left[1] @ right[1].T)).sum()


def _states(name: str, hidden: Tensor) -> Tensor:
    if hidden.ndim != 2:
        raise InputError(f"{name} has shape {list(hidden.shape)}; accepted is one state a response token, [T, d].")
    return hidden.detach().to(torch.float64)


def _residuals(side: str, probs: Tensor, ids: Tensor) -> Tensor:
    """`e_{y_t} - s_t`, float64 `[T, V]`."""
    if probs.ndim != 2 or ids.shape != probs.shape[:1]:
        raise InputError(
            f"{side}_probs has shape {list(probs.shape)} and {side}_ids {list(ids.shape)}; accepted is [T, V] and [T]."
        )
    rows = probs.detach().to(torch.float64)
    sums = rows.sum(1)
    if bool((rows < 0).any()) or bool(((sums - 1).abs() > PROBABILITY_TOLERANCE).any()):
        raise InputError(f"{side}_probs has a row that is no probability distribution; give the softmax of the logits.")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= probs.shape[1]):
        raise InputError(f"{side}_ids has an id outside 0..{probs.shape[1] - 1}, the vocabulary of {side}_probs.")
    return torch.nn.functional.one_hot(ids.long(), probs.shape[1]).to(torch.float64) - rows
