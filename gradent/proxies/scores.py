"""CHES and the head's block of pairs, from what enters and leaves the head.

Letters: B pairs, T tokens of a response (T_w, T_l of chosen and rejected), d the width of the hidden states, V
vocabulary; h_t `[d]` what enters the head at the position that predicts token t, e_t `[V]` the gradient of that token's
log-prob by what leaves it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradent.errors import NonFiniteError
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.kernels.common.numerics import accumulator
from gradent.kernels.dispatch import reduce_group
from gradent.model.head import HeadPass
from gradent.model.observed import observed
from gradent.model.parameters import input_device, unwrap_compiled
from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch
from gradent.proxies.passes import pair_heads

__all__ = ["PairProxies", "ches", "head_gram", "measure_proxies"]

_PARTS = ("forward", "ches", "head")


@dataclass(frozen=True, kw_only=True)
class PairProxies:
    """Stand-ins for the Gram entries of B pairs, from one forward of each response.

    Attributes:
        ches: the CHES score, float64 `[B]`: `⟨Σ_t h_t^w, Σ_t h_t^l⟩ − ‖Σ_t h_t^w‖²`, in squared units of the hidden
            states. The larger, the more the pair is expected to pull chosen down. Source: Razin et al. 2024,
            "Unintentional Unalignment".
        ches_normalized: the same of means over tokens instead of sums, float64 `[B]`.
        chosen_logp: `log π(y_w|x)` in nats, float64 `[B]`.
        rejected_logp: `log π(y_l|x)` in nats, float64 `[B]`.
        chosen_len: completion tokens of the chosen response, int64 `[B]`.
        rejected_len: completion tokens of the rejected response, int64 `[B]`.
        head: the head's block, as `head_gram` returns it; None where it was not asked for.
        seconds: what it took, by part: `forward`, `ches`, `head`.
    """

    ches: Tensor
    ches_normalized: Tensor
    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    head: PairGram | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


def ches(model: nn.Module, batch: PairBatch, *, length_normalized: bool = False) -> Tensor:
    """The CHES score of every pair: `⟨Σ_t h_t^w, Σ_t h_t^l⟩ − ‖Σ_t h_t^w‖²`.

    h_t is what enters the model's head (after the last norm) at the position that predicts token t of a response: from
    the prompt's last token to the response's last but one. Sums are formed in float64, whatever the model's dtype.
    Source: the centered hidden embedding similarity of Razin et al. 2024, "Unintentional Unalignment: Likelihood
    Displacement in Direct Preference Optimization". The model is left as it was, and needs nothing trainable.

    Args:
        model: a causal language model with `get_output_embeddings()`.
        batch: B preference pairs, on any device.
        length_normalized: of means over a response's tokens instead of sums, as their paper has it too.

    Returns:
        The scores, float64 `[B]` on the CPU, in squared units of the hidden states; the larger, the more the pair is
        expected to pull chosen down.

    Raises:
        InputError: token ids outside the model's vocabulary.
        ModelError: the model is not causal, or does not show what enters its head.
        NonFiniteError: a nan or inf in the hidden states or logits of a pair.

    Example:
        >>> gradent.proxies.ches(model, batch)  # doctest: +SKIP
    """
    found = measure_proxies(model, batch, head=False)
    return found.ches_normalized if length_normalized else found.ches


def head_gram(model: nn.Module, batch: PairBatch, *, memory_budget: int | str | None = None) -> PairGram:
    """The head's block of every pair's Gram entries, from forwards alone: `Σ_{a,b} ⟨e_a, e_b⟩ ⟨h_a, h_b⟩`.

    The gradient of `log π(y|x)` by the weight of the head, `[V, d]`, is `Σ_t e_t h_tᵀ`, with `e_t = onehot(y_t) −
    softmax(logits_t)`. Its products are what `measure(by_module=True)` gives for the head where the head is trained and
    its weight is its own. Where the weight is tied to the embedding, they are those of its use in the head alone: the
    parameter's whole gradient has the embedding's rows too, and their cross terms. Where the head is frozen
    (under LoRA, mostly), they are those of a parameter that is not trained. A bias of the head is left out. Relatives:
    the NTHR and GWHES scores of Deng et al. 2025.

    Args:
        model: as in `ches`. Logits that are the head's output by a factor, or soft-capped, are accounted for.
        batch: B preference pairs, on any device.
        memory_budget: bytes, or a string such as "512MiB", that the reductions' scratch may take; None for 256 MiB.

    Returns:
        A `PairGram` of the B pairs, float64 on the CPU: `chosen_sq`, `rejected_sq` and `inner` are the head's alone.

    Raises:
        InputError: token ids outside the model's vocabulary.
        ModelError: as in `ches`, or the model changes the head's output in another way.
        NonFiniteError: a nan or inf in the hidden states or logits of a pair.
        MemoryBudgetError: the budget is malformed.

    Example:
        >>> gradent.proxies.head_gram(model, batch).cosine  # doctest: +SKIP
    """
    found = measure_proxies(model, batch, memory_budget=memory_budget).head
    assert found is not None
    return found


def measure_proxies(
    model: nn.Module, batch: PairBatch, *, head: bool = True, memory_budget: int | str | None = None
) -> PairProxies:
    """Every stand-in of every pair at once, from one forward of each response.

    Args:
        model: as in `ches`.
        batch: B preference pairs, on any device.
        head: also the head's block, which `head_gram` describes.
        memory_budget: as in `head_gram`.

    Returns:
        The `PairProxies` of the B pairs, on the CPU.

    Raises:
        InputError: as in `head_gram`.
        ModelError: as in `head_gram`.
        NonFiniteError: as in `head_gram`.
        MemoryBudgetError: as in `head_gram`.
    """
    model = unwrap_compiled(model)
    budget = parse_budget(memory_budget) or DEFAULT_BUDGET
    device, seconds = input_device(model), dict.fromkeys(_PARTS, 0.0)
    scores = torch.zeros(4, len(batch), dtype=torch.float64)  # log-probs of both sides, CHES of sums and of means
    entries = torch.zeros(3, len(batch), dtype=torch.float64)
    clock = partial(_lap, device, seconds)
    with torch.no_grad(), observed(model):
        started = clock("", 0.0)
        for heads in pair_heads(model, batch, slopes=head):
            started = clock("forward", started)
            for pair, sides in heads.items():
                scores[2:, pair] = _ches(*(side.hidden for side in sides)).cpu()
            started = clock("ches", started)
            for pair, sides in heads.items():
                found = [_errors(side, wanted=head) for side in sides]
                scores[:2, pair] = torch.stack([logp for logp, _ in found]).cpu()
                if head:
                    factors = [
                        (errors, side.hidden.to(errors.dtype))
                        for (_, errors), side in zip(found, sides, strict=True)
                    ]  # fmt: skip
                    entries[:, pair] = reduce_group(factors, budget=budget).cpu()
            started = clock("head", started)
    _check_finite(torch.cat([scores, entries]))
    chosen_logp, rejected_logp, summed, normalized = scores
    same: dict[str, Any] = {
        "chosen_logp": chosen_logp, "rejected_logp": rejected_logp,
        "chosen_len": batch.chosen_len.cpu(), "rejected_len": batch.rejected_len.cpu(),
    }  # fmt: skip
    gram = PairGram(chosen_sq=entries[0], rejected_sq=entries[1], inner=entries[2], **same) if head else None
    return PairProxies(ches=summed, ches_normalized=normalized, **same, head=gram, seconds=seconds)


def _lap(device: torch.device, seconds: dict[str, float], part: str, started: float) -> float:
    """Add the time since `started` to a part; returns the time now, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    now = time.perf_counter()
    if part:
        seconds[part] += now - started
    return now


def _ches(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The score of sums and that of means, float64 `[2]`, from hidden states `[T_w, d]` and `[T_l, d]`."""
    # Half precision overflows at a few hundred tokens: a sum's squared norm grows with the square of the tokens.
    sums = [part.double().sum(0) for part in (chosen, rejected)]
    means = [total / len(part) for total, part in zip(sums, (chosen, rejected), strict=True)]
    return torch.stack([(w @ other - w @ w) for w, other in (sums, means)])


def _errors(seen: HeadPass, *, wanted: bool) -> tuple[Tensor, Tensor]:
    """The response's log-prob, float64, and if wanted its tokens' gradients by the head's output, `[T, V]`."""
    wide = seen.logits.to(accumulator(seen.logits.dtype))
    targets = seen.ids[:, None]
    highest = wide.amax(-1, keepdim=True)
    errors = (wide - highest).exp_()
    total = errors.sum(-1, keepdim=True)
    logp = (wide.gather(1, targets) - highest - total.log()).double().sum()
    if not wanted:
        return logp, errors
    errors.div_(-total).scatter_add_(1, targets, torch.ones_like(targets, dtype=wide.dtype))
    is_plain = isinstance(seen.slope, float) and seen.slope == 1
    return logp, errors if is_plain else errors.mul_(seen.slope)


def _check_finite(values: Tensor) -> None:
    bad = (~values.isfinite()).any(0).nonzero()
    if len(bad):
        raise NonFiniteError(
            f"pair {int(bad[0])}: a stand-in or a log-prob of this pair is nan or inf. The model's forward pass "
            "overflows or divides by zero on it: try a wider dtype (bfloat16 or float32 instead of float16), or check "
            "the checkpoint for nan."
        )
