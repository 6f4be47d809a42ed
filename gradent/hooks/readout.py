"""Reading a trainer's own backward: the coefficient with which it differentiates each response's log-prob.

In a margin loss the gradient that reaches row i is `c_i ∇log π(y_i|x_i)` with one scalar `c_i = ∂L/∂log π(y_i|x_i)` a
row. It can be read where the log-probs, or the logits that they are made of, leave the model. Means over the batch,
gradient accumulation and a gradient scaler all sit in `c_i`.

Letters: N rows of the forward, L tokens, K positions of the output (L, fewer, or under prompt tuning more), V the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradent.kernels.reference import accumulator, spans

__all__ = ["Coefficients", "FusedReadout", "LogitsReadout", "Readout", "RewardReadout", "find_readout"]

TILE = 4 * 2**20
"""Bytes of absolute values that are formed at once."""

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest spread of a coefficient along a row that rounding explains, relative to its size, by the gradient's dtype."""


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What one forward's output and its gradient say of each of its N rows.

    Attributes:
        c: `∂L/∂log π(y|x)`, float64 `[N]`; 0 where the loss does not move the row.
        logp: `log π(y|x)` in nats, float64 `[N]`; for a reward model, the reward.
        marks: the tokens that the log-prob is over, bool `[N, L]`.
        tokens: each token's own coefficient, of which `c` is the mean, float64 `[N, L]`.
        spread: largest deviation of a token's coefficient from its row's, relative to `|c|`.
        given: whether the marks came with the batch (labels, or the head's mask), and were not told by the gradient.
        constant: whether rounding explains the spread; if not, the trainer's gradient is not `c ∇log π(y|x)`.
    """

    c: Tensor
    logp: Tensor
    marks: Tensor
    tokens: Tensor
    spread: float
    constant: bool
    given: bool = True


class Readout(Protocol):
    """Where a forward's log-probs leave the model."""

    @property
    def root(self) -> Tensor:
        """The tensor whose gradient tells the coefficients."""
        ...

    def read(self, grad: Tensor) -> Coefficients:
        """The coefficients.

        Args:
            grad: the gradient that arrived at `root`.

        Returns:
            The coefficients of the N rows.
        """
        ...


@dataclass(frozen=True)
class FusedReadout:
    """TRL's fused head: per-token log-probs `[N, K]`, the first predicted token first."""

    root: Tensor
    mask: Tensor
    length: int

    def read(self, grad: Tensor) -> Coefficients:
        """See `Readout.read`."""
        take = slice(-(self.length - 1), None)
        grad, logps, mask = grad[:, take].double(), self.root.detach()[:, take].double(), self.mask[:, take].bool()
        count = mask.sum(1).clamp_min(1)
        c = (grad * mask).sum(1) / count
        off = ((grad - c[:, None]) * mask).abs().amax(1)
        marks, tokens = (pad(part, (self.length - mask.shape[1], 0)) for part in (mask, grad * mask))
        return _coefficients(c, (logps * mask).sum(1), marks, tokens, off, self.root.dtype)


@dataclass(frozen=True)
class LogitsReadout:
    """Logits `[N, K, V]`: with v the best token other than the target y, `c = g_y - g_v exp(z_y - z_v)`."""

    root: Tensor
    input_ids: Tensor
    labels: Tensor | None

    def read(self, grad: Tensor) -> Coefficients:
        """See `Readout.read`."""
        rows = [self._row(index, grad[index]) for index in range(len(grad))]
        c, logp, marks, tokens, off = (torch.stack(column) for column in zip(*rows, strict=True))
        found = _coefficients(c, logp, marks, tokens, off, self.root.dtype)
        return replace(found, given=self.labels is not None)

    def _row(self, index: int, grad: Tensor) -> tuple[Tensor, ...]:
        ids = self.input_ids[index]
        count = min(len(ids) - 1, self.root.shape[1] - 1)  # positions that predict a token of the row
        logits, grad = self.root.detach()[index, -count - 1 : -1], grad[-count - 1 : -1]
        size = _absolute_sums(grad)
        given = None if self.labels is None else self.labels[index, -count:] != -100
        # All there is to see lies between the first and the last position that matters; a prompt's do not.
        start, stop = _ends(size != 0 if given is None else (size != 0) | given)
        logits, grad, size, targets = (part[start:stop] for part in (logits, grad, size, ids[-count:, None]))
        other = _best_other(logits, targets)
        z_y, z_v = (logits.gather(1, which)[:, 0].double() for which in (targets, other))
        g_y, g_v = (grad.gather(1, which)[:, 0].double() for which in (targets, other))
        normalizer = torch.logsumexp(logits if logits.dtype == torch.float64 else logits.float(), -1).double()
        logps, p_v = z_y - normalizer, (z_v - normalizer).exp()
        used = _with_certain_tokens((g_y != 0) | (g_v != 0), logps) if given is None else given[start:stop]
        # A token that is all but certain hardly moves; its gradient is rounding, and weighs as little as it matters.
        weight = -torch.expm1(logps) * used
        each = torch.where(weight > 0, g_y - g_v * (z_y - z_v).clamp_max(80).exp(), 0.0)
        c = (each * weight).sum() / weight.sum().clamp_min(1e-300)
        # v has its share of the softmax and nothing besides, and so have all others; no other position is moved: else
        # the loss has a part that is no log-prob of these tokens (a z-loss, an entropy bonus, a term over the prompt).
        others = size - 2 * c.abs() * weight  # of c(onehot - p) the absolute values sum to 2|c|(1 - p_y), or to nothing
        off = torch.cat([((each - c) * weight).abs(), ((g_v + c * p_v) * used).abs(), others.abs(), c.abs()[None] * 0])
        marks, tokens = (pad(part, (len(ids) - count + start, count - stop)) for part in (used, each * used))
        return c, (logps * used).sum(), marks, tokens, off.amax()


def _ends(live: Tensor) -> tuple[int, int]:
    """The first place that is true, and the place after the last; (0, 0) where none is."""
    where = live.nonzero()[:, 0].tolist()
    return (where[0], where[-1] + 1) if where else (0, 0)


def _best_other(logits: Tensor, targets: Tensor) -> Tensor:
    """The likeliest token besides the target, int64 `[K, 1]`."""
    best = logits.argmax(-1, keepdim=True)
    same = (best == targets)[:, 0]
    if bool(same.any()):
        best[same] = logits[same].scatter(1, targets[same], float("-inf")).argmax(-1, keepdim=True)
    return best


def _absolute_sums(values: Tensor) -> Tensor:
    """Sums of absolute values along the vocabulary, float64 `[K]`."""
    # `vector_norm` adds one by one in float32: 2e-4 too little at a vocabulary of 150,000, where `sum` loses 1e-7.
    wide = accumulator(values.dtype)
    sums = torch.empty(len(values), dtype=torch.float64, device=values.device)
    for span in spans(len(values), max(1, TILE // (values.shape[1] * wide.itemsize))):
        sums[span] = values[span].abs().to(wide).sum(-1).double()
    return sums


@dataclass(frozen=True)
class RewardReadout:
    """A reward model's scalar head, `[N, 1]`: the gradient is the coefficient."""

    root: Tensor
    attention_mask: Tensor

    def read(self, grad: Tensor) -> Coefficients:
        """See `Readout.read`."""
        c, reward = grad[:, 0].double(), self.root.detach()[:, 0].double()
        marks = self.attention_mask.bool()
        return _coefficients(c, reward, marks, c[:, None] * marks, torch.zeros_like(c), self.root.dtype)


def _coefficients(
    c: Tensor, logp: Tensor, marks: Tensor, tokens: Tensor, off: Tensor, dtype: torch.dtype
) -> Coefficients:
    active = c != 0
    spread = float((off[active] / c[active].abs()).max()) if bool(active.any()) else 0.0
    # A row whose coefficients cancel to zero, but are not zero, is not inactive.
    cancelled = bool((off[~active] > 0).any())
    limit = ROUNDING.get(dtype, ROUNDING[torch.bfloat16])
    constant = spread <= limit and not cancelled
    host = (part.cpu() for part in (c, logp, marks, tokens))
    c, logp, marks, tokens = host
    return Coefficients(c=c, logp=logp, marks=marks, tokens=tokens, spread=spread, constant=constant)


def _with_certain_tokens(moved: Tensor, logps: Tensor) -> Tensor:
    """Tokens that got a gradient, and those between them that got none because they are certain; bool `[K]`."""
    where = moved.nonzero()
    if not len(where):
        return moved
    inside = torch.zeros_like(moved)
    inside[int(where[0]) : int(where[-1]) + 1] = True
    return moved | (inside & (logps > -1e-6))


def find_readout(output: Any, kwargs: Mapping[str, Any], input_ids: Tensor) -> Readout | str:
    """Where a forward's log-probs can be read.

    Args:
        output: what the model returned.
        kwargs: what it was called with.
        input_ids: int64 `[N, L]`.

    Returns:
        The readout, or why there is none.
    """
    log_probs = getattr(output, "log_probs", None)
    labels = kwargs.get("labels")
    if isinstance(log_probs, Tensor) and log_probs.requires_grad:
        mask = getattr(output, "label_mask", None)
        if mask is None and labels is not None:
            mask = labels[:, 1:] != -100
        if mask is None or mask.shape != log_probs.shape:
            return "its log_probs come without a mask of the tokens that they are over"
        return FusedReadout(log_probs, mask, input_ids.shape[1])
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        return "its output holds neither log_probs nor logits that a gradient can reach"
    if logits.dim() == 2 and logits.shape == (len(input_ids), 1):
        mask = kwargs.get("attention_mask")
        return RewardReadout(logits, torch.ones_like(input_ids) if mask is None else mask)
    if logits.dim() == 3 and logits.shape[0] == len(input_ids) and logits.shape[2] > 1:
        return LogitsReadout(logits, input_ids, labels)
    return f"its logits have shape {list(logits.shape)}, which is neither [N, K, vocabulary] nor [N, 1]"
