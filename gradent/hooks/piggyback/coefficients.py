"""Reading a trainer's own backward: the coefficient with which it differentiates each response's log-prob.

In a margin loss the gradient that reaches row i is `c_i ∇log π(y_i|x_i)` with one scalar `c_i = ∂L/∂log π(y_i|x_i)` a
row. It can be read where the log-probs, or the logits that they are made of, leave the model. Means over the batch,
gradient accumulation and a gradient scaler all sit in `c_i`.

Letters: N rows of the forward, L tokens, K positions of the output (L, fewer, or under prompt tuning more), V the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradent.kernels.common.numerics import accumulator
from gradent.kernels.common.numerics import spans as tiles
from gradent.kernels.common.streams import at_once

__all__ = [
    "FAINTEST",
    "Coefficients",
    "FusedReadout",
    "LogitsReadout",
    "Readout",
    "RewardReadout",
    "ValueReadout",
    "find_readout",
]

BLOCK = 256
"""Tokens of the vocabulary that `_best_others` looks at together."""

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest spread of a coefficient along a row that rounding explains, relative to its size, by the gradient's dtype."""

FAINTEST = {torch.float32: 2.0**-100, torch.bfloat16: 2.0**-100, torch.float16: 2.0**-11}
"""Coefficients below which output gradients leave the numbers that their dtype holds at full precision: such a row's
gradient cannot be read, and it is taken for one that the loss does not move."""


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What one forward's output and its gradient say of each of its N rows, on the CPU."""

    c: Tensor  # `∂L/∂log π(y|x)`, float64 `[N]`; 0 where the loss does not move the row
    logp: Tensor  # `log π(y|x)` in nats, float64 `[N]`; for a reward model, the reward
    marks: Tensor  # the tokens that the log-prob is over, bool `[N, L]`
    tokens: Tensor  # coefficient of each token, of which `c` is the mean, float64 `[N, L]`
    spread: float  # largest deviation of a token's coefficient from its row's, relative to `|c|`
    is_constant: bool  # rounding explains the spread; if not, the trainer's gradient is not `c ∇log π(y|x)`
    is_of_tokens: bool = True  # the trainer's gradient is `Σ_t tokens_t ∇log π(y_t)`, up to rounding
    has_given_marks: bool = True  # they came with the batch (labels, the head's mask), and are not made of the gradient
    is_reward: bool = False  # the model is a reward model
    predicted: int | None = None  # the last tokens, of which alone the output is (`logits_to_keep`); None for all


@dataclass(frozen=True)
class FusedReadout:
    """TRL's fused head: per-token log-probs `[N, K]`, the first predicted token first."""

    root: Tensor
    mask: Tensor
    length: int

    def read(self, grad: Tensor) -> Coefficients:
        """The coefficients of the N rows, from the gradient that arrived at `root`."""
        take = slice(-(self.length - 1), None)
        grad, logps, mask = grad[:, take].double(), self.root.detach()[:, take].double(), self.mask[:, take].bool()
        count = mask.sum(1).clamp_min(1)
        c = (grad * mask).sum(1) / count
        off = ((grad - c[:, None]) * mask).abs().amax(1)
        marks, tokens = (pad(part, (self.length - mask.shape[1], 0)) for part in (mask, grad * mask))
        return _judge(c, (logps * mask).sum(1), marks, tokens, off, self.root.dtype)


@dataclass(frozen=True)
class LogitsReadout:
    """Logits `[N, K, V]`: with v the best token other than the target y, `c = g_y - g_v exp(z_y - z_v)`.

    z are the logits over the temperature, g the gradient there.
    """

    root: Tensor
    input_ids: Tensor
    labels: Tensor | None
    temperature: float = 1.0

    def read(self, grad: Tensor) -> Coefficients:
        """The coefficients of the N rows, from the gradient that arrived at `root`."""
        length = self.input_ids.shape[1]
        count = min(length - 1, self.root.shape[1] - 1)  # positions that predict a token of the row
        logits, grad = self.root.detach()[:, -count - 1 : -1], grad[:, -count - 1 : -1]
        if self.temperature != 1:
            logits, grad = logits / self.temperature, grad * self.temperature
        targets = self.input_ids[:, -count:]
        labelled = None if self.labels is None else self.labels[:, -count:] != -100
        size = torch.stack([_absolute_sums(row) for row in grad])
        # All there is to see lies between the first and the last position that matters; a prompt's do not.
        spans = _ends(size != 0 if labelled is None else labelled)
        at = _positions(spans, logits.device)
        y = targets[at]
        v, top = _best_others(logits, spans, at, y)
        (z_y, z_v), (g_y, g_v) = (
            [values[at[0], at[1], token].double() for token in (y, v)] for values in (logits, grad)
        )
        normalizer = _log_normalizers(logits, spans, torch.maximum(top, z_y))

        def spread(values: Tensor) -> Tensor:
            """Values of the positions that matter, on all positions."""
            return values.new_zeros(size.shape).index_put_(at, values)

        logps, used = spread(z_y - normalizer), labelled
        if used is None:  # tokens that got a gradient, and those between them that got none because they are certain
            moved = spread((g_y != 0) | (g_v != 0))
            inside_moved = (moved.cumsum(1) > 0) & (moved.flip(1).cumsum(1).flip(1) > 0)
            used = moved | (inside_moved & (logps > -1e-6))
        # A token that is all but certain hardly moves; its gradient is rounding, and weighs as little as it matters.
        weight = -torch.expm1(logps) * used
        tokens = torch.where(weight > 0, spread(g_y - g_v * (z_y - z_v).exp()), 0.0)
        c = (tokens * weight).sum(1) / weight.sum(1).clamp_min(1e-300)
        # v has its share of the softmax and nothing besides, and so have all others; no other position is moved: else
        # the loss has a part that is no log-prob of these tokens (a z-loss, an entropy bonus, a term over the prompt).
        others = size - 2 * c.abs()[:, None] * weight  # of c(onehot - p) the sizes sum to 2|c|(1 - p_y), or to nothing
        p_v = spread((z_v - normalizer).exp())
        off = torch.stack([(tokens - c[:, None]) * weight, (spread(g_v) + c[:, None] * p_v) * used, others])
        # The same of weights that differ from token to token.
        besides = torch.stack([(spread(g_v) + tokens * p_v) * used, size - 2 * tokens.abs() * weight])
        marks, tokens = (pad(part, (length - count, 0)) for part in (used, tokens * used))
        coefficients = _judge(c, (logps * used).sum(1), marks, tokens, off.abs().amax((0, 2)), self.root.dtype)
        largest = tokens.abs().amax(1)
        is_small = besides.abs().amax((0, 2)) <= _rounding(grad.dtype) * largest
        is_of_tokens = bool((is_small | (largest < FAINTEST.get(grad.dtype, 0.0))).all())
        return replace(
            coefficients, has_given_marks=self.labels is not None, is_of_tokens=is_of_tokens,
            predicted=count if self.root.shape[1] < length else None,
        )  # fmt: skip


def _ends(live: Tensor) -> list[tuple[int, int]]:
    """Each row's first true position of bool `[N, K]` and the position after its last; (0, 0) where none is true."""
    first, after = live.int().argmax(1), live.shape[1] - live.flip(1).int().argmax(1)
    ends = torch.stack([first, after, live.any(1)], 1).tolist()
    return [(start, stop) if some else (0, 0) for start, stop, some in ends]


def _positions(spans: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and position of everything inside the rows' spans, int64 `[M]` each."""
    inside = [(row, position) for row, span in enumerate(spans) for position in range(*span)]
    rows, positions = torch.tensor(inside, dtype=torch.int64).view(-1, 2).to(device).unbind(1)
    return rows, positions


def _best_others(
    logits: Tensor, spans: Sequence[tuple[int, int]], at: tuple[Tensor, Tensor], targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The likeliest token besides the target and its logit, `[M]` each, at the M positions `at` inside the spans."""
    # The best of each block, then the place inside the best block: on a CPU `argmax` takes 6 to 20 times `amax`'s time.
    maxima = torch.cat([_block_maxima(logits[row, slice(*span)]) for row, span in enumerate(spans)])
    step = max(1, at_once(logits.device) // (BLOCK * 4 * 8))  # a block's tokens are int64, twice
    parts = [
        _best_in_blocks(logits, [index[tile] for index in at], targets[tile], maxima[tile])
        for tile in tiles(len(targets), step)
    ]
    if not parts:
        return targets, targets.double()
    tokens, best = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, best


def _best_in_blocks(logits: Tensor, at: Sequence[Tensor], targets: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """`_best_others` of M positions, from the largest logit of each of their blocks `[M, blocks]`, which it changes."""

    def block(numbers: Tensor) -> tuple[Tensor, Tensor]:
        """One block of each position: its tokens, and their logits with -inf for the target; `[M, BLOCK]` each."""
        tokens = numbers[:, None] * BLOCK + torch.arange(BLOCK, device=logits.device)
        outside = (tokens >= logits.shape[2]) | (tokens == targets[:, None])
        inside = tokens.clamp_max(logits.shape[2] - 1)
        return tokens, logits[at[0][:, None], at[1][:, None], inside].masked_fill_(outside, float("-inf"))

    of_target = targets // BLOCK
    maxima[torch.arange(len(targets), device=targets.device), of_target] = block(of_target)[1].amax(1)
    tokens, values = block(maxima.argmax(1))
    best = values.argmax(1, keepdim=True)
    return tokens.gather(1, best)[:, 0], values.gather(1, best)[:, 0].double()


def _block_maxima(logits: Tensor) -> Tensor:
    """Largest logit of each `BLOCK` tokens, `[K, V / BLOCK rounded up]`."""
    full = logits.shape[1] // BLOCK * BLOCK
    parts = [logits[:, :full].reshape(len(logits), full // BLOCK, BLOCK).amax(2)] if full else []
    if full < logits.shape[1]:
        parts.append(logits[:, full:].amax(1, keepdim=True))
    return torch.cat(parts, 1)


def _log_normalizers(logits: Tensor, spans: Sequence[tuple[int, int]], top: Tensor) -> Tensor:
    """`log Σ exp` along the vocabulary of the positions inside the spans, given their largest logit; float64 `[M]`."""
    wide = accumulator(logits.dtype)
    sums = torch.empty(len(top), dtype=wide, device=logits.device)
    done = 0
    for row, (start, stop) in enumerate(spans):
        for span in _tiles(logits[row, start:stop]):
            size = span.stop - span.start
            largest = top[done : done + size, None].to(wide)
            sums[done : done + size] = (logits[row, start:stop][span] - largest).exp_().sum(1)
            done += size
    return sums.double().log_().add_(top)


def _absolute_sums(values: Tensor) -> Tensor:
    """Sums of absolute values along the vocabulary, float64 `[K]`."""
    # `vector_norm` adds one by one in float32: 2e-4 too little at a vocabulary of 150,000, where `sum` loses 1e-7.
    wide = accumulator(values.dtype)
    sums = torch.empty(len(values), dtype=wide, device=values.device)
    for span in _tiles(values):
        sums[span] = values[span].abs().to(wide).sum(1)
    return sums.double()


def _tiles(values: Tensor) -> list[slice]:
    """Rows of `[K, V]` in spans, of which absolute values or exponentials are formed at once."""
    row = values.shape[1] * accumulator(values.dtype).itemsize
    return tiles(len(values), max(1, at_once(values.device) // row))


@dataclass(frozen=True)
class RewardReadout:
    """A reward model's scalar head, `[N, 1]`: the gradient is the coefficient."""

    root: Tensor
    attention_mask: Tensor

    def read(self, grad: Tensor) -> Coefficients:
        """The coefficients of the N rows, from the gradient that arrived at `root`."""
        c, reward = grad[:, 0].double(), self.root.detach()[:, 0].double()
        marks = self.attention_mask.bool()
        coefficients = _judge(c, reward, marks, c[:, None] * marks, torch.zeros_like(c), self.root.dtype)
        return replace(coefficients, is_reward=True)


@dataclass(frozen=True)
class ValueReadout:
    """A value head, `[N, L]`, read at one token of each row (LLaMA-Factory's reward stage): a reward like another."""

    root: Tensor
    attention_mask: Tensor
    besides: Tensor | None = None
    """The same forward's logits, which the loss is not to move."""

    def read(self, grad: Tensor) -> Coefficients:
        """The coefficients of the N rows, from the gradient that arrived at `root`."""
        grad = grad.double()
        at = grad.abs().argmax(1, keepdim=True)
        c, reward = grad.gather(1, at)[:, 0], self.root.detach().gather(1, at)[:, 0].double()
        off = grad.scatter(1, at, 0.0).abs().amax(1)
        marks = self.attention_mask.bool()
        coefficients = _judge(c, reward, marks, c[:, None] * marks, off, self.root.dtype)
        return replace(coefficients, is_reward=True, is_of_tokens=False)


Readout = FusedReadout | LogitsReadout | RewardReadout | ValueReadout
"""Where a forward's log-probs leave the model: `read` takes the gradient at the tensor `root` for the coefficients."""


def _judge(c: Tensor, logp: Tensor, marks: Tensor, tokens: Tensor, off: Tensor, dtype: torch.dtype) -> Coefficients:
    """Coefficients on the CPU; `off` `[N]` is each row's largest deviation, `dtype` that of the gradient."""
    c, logp, marks, tokens, off = (part.cpu() for part in (c, logp, marks, tokens, off))
    least = FAINTEST.get(dtype, 0.0)
    is_faint = (c.abs() < least) & (off < least)
    c, off = c.masked_fill(is_faint, 0.0), off.masked_fill(is_faint, 0.0)
    tokens = tokens.masked_fill(is_faint.view(-1, *(1,) * (tokens.dim() - 1)), 0.0)
    active = c != 0
    spread = float((off[active] / c[active].abs()).max()) if bool(active.any()) else 0.0
    # A row whose coefficients cancel to zero, but are not zero, is not inactive.
    is_cancelled = bool((off[~active] > 0).any())
    is_constant = spread <= _rounding(dtype) and not is_cancelled
    return Coefficients(c=c, logp=logp, marks=marks, tokens=tokens, spread=spread, is_constant=is_constant)


def _rounding(dtype: torch.dtype) -> float:
    """`ROUNDING` of a dtype."""
    return ROUNDING.get(dtype, ROUNDING[torch.bfloat16])


def find_readout(
    output: Any, kwargs: Mapping[str, Any], input_ids: Tensor, *, temperature: float = 1.0
) -> Readout | str:
    """Where the log-probs of a forward of `input_ids` `[N, L]` can be read, or why nowhere."""
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
    value = _find_value(output, input_ids)
    if value is not None:
        mask = kwargs.get("attention_mask")
        besides = output[0] if isinstance(output[0], Tensor) and output[0].requires_grad else None
        return ValueReadout(value, torch.ones_like(input_ids) if mask is None else mask, besides)
    if logits is None:
        logits = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        return "its output holds neither log_probs nor logits that a gradient can reach"
    if logits.dim() == 2 and logits.shape == (len(input_ids), 1):
        mask = kwargs.get("attention_mask")
        return RewardReadout(logits, torch.ones_like(input_ids) if mask is None else mask)
    if logits.dim() == 3 and logits.shape[0] == len(input_ids) and logits.shape[2] > 1:
        return LogitsReadout(logits, input_ids, labels, temperature)
    return f"its logits have shape {list(logits.shape)}, which is neither [N, K, vocabulary] nor [N, 1]"


def _find_value(output: Any, input_ids: Tensor) -> Tensor | None:
    """The value head's part of a tuple (TRL's `AutoModelForCausalLMWithValueHead`); None where there is none."""
    for part in output[1:] if isinstance(output, tuple) and type(output) is tuple else ():
        if isinstance(part, Tensor) and part.shape == input_ids.shape and part.requires_grad:
            return part
    return None
