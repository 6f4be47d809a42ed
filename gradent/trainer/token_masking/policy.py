"""A policy whose log-probs are masked, for a loss that knows nothing of masks.

Letters: N = 2B rows, rows 0..B-1 chosen and B..2B-1 rejected; K predicted tokens a row; u scores, m masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradent.errors import ModelError
from gradent.losses.token_masked import hard_mask, masked_logps, soft_mask
from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
from gradent.trainer.token_masking.head import MaskHead

__all__ = ["LogProbs", "MaskedPolicy", "TokenMasks", "mask_tokens", "read_masks"]


@dataclass(frozen=True, kw_only=True)
class TokenMasks:
    """Scores and masks of a batch's tokens, `[N, K]` each.

    Attributes:
        tokens: the responses' tokens, bool; elsewhere the others mean nothing.
        scores: u.
        soft: `σ(k(u - r))`.
        kept: `u >= r`, bool.
    """

    tokens: Tensor
    scores: Tensor
    soft: Tensor
    kept: Tensor


def mask_tokens(head: MaskHead, hidden: Tensor, tokens: Tensor, config: TokenMaskedDPOConfig, k: float) -> TokenMasks:
    """Scores and masks of marked tokens, bool `[N, K]`, from the hidden states that predict them `[N, K, width]`."""
    device = head.outer.weight.device
    marked = hidden[tokens.to(hidden.device)].to(device)
    marked_scores = head(marked.detach() if config.mask_detach else marked)
    empty = torch.zeros(tokens.shape, dtype=marked_scores.dtype, device=device)
    scores = empty.masked_scatter(tokens.to(device), marked_scores).to(tokens.device)
    if config.mask_freeze:
        ones = torch.ones_like(scores)
        return TokenMasks(tokens=tokens, scores=scores.detach(), soft=ones, kept=torch.ones_like(tokens))
    return TokenMasks(
        tokens=tokens, scores=scores, soft=soft_mask(scores, threshold=config.mask_threshold, k=k),
        kept=hard_mask(scores.detach(), threshold=config.mask_threshold),
    )  # fmt: skip


def read_masks(
    model: Any, backbone: nn.Module, head: MaskHead, config: TokenMaskedDPOConfig, k: float, kwargs: Mapping[str, Any]
) -> tuple[Any, TokenMasks]:
    """One forward of the policy under TRL's fused head, and the masks of the tokens that it predicts."""
    with _last_hidden_states(backbone) as seen:
        output = model(**kwargs)
    if len(seen) != 1:
        raise ModelError(
            f"the model's backbone ({type(backbone).__name__}) ran {len(seen)} times in one forward; token masking "
            "needs it to run once, as it does under TRL's fused head (TRL 1.15 or newer)."
        )
    tokens = kwargs["labels"][:, 1:] != -100
    hidden = seen[0][:, :-1][:, -tokens.shape[1] :]  # prompt learning puts virtual tokens in front
    return output, mask_tokens(head, hidden, tokens, config, k)


@contextmanager
def _last_hidden_states(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states `[N, L, width]` of the backbone's forwards inside the block."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if state is None:
            raise ModelError(
                f"{type(module).__name__} returned {type(output).__name__} without last_hidden_state, of which token "
                "scores are made; accepted is a causal language model of transformers."
            )
        seen.append(state)

    handle = backbone.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


class MaskedPolicy:
    """Called in the policy's place, it gives kept log-probs, and puts the reference's into the batch.

    `read` runs the policy with its masks, `plain` as it is; `reference` gives the reference's log-probs `[N, K]`.

    Attributes:
        batch: TRL's, with the reference's kept log-probs of each response once the policy was called.
        masks: those of the batch's tokens.
        mask: m, what log-probs were multiplied by.
        logps: `log π(y|x)` of whole responses, `[N]`, without gradient.
    """

    masks: TokenMasks
    mask: Tensor
    logps: Tensor

    def __init__(
        self,
        *,
        read: Callable[[Mapping[str, Any]], tuple[Any, TokenMasks]],
        plain: Any,
        reference: Callable[[Mapping[str, Any]], Tensor],
        batch: dict[str, Any],
        is_hard: bool,
    ) -> None:
        self._read, self._plain, self._reference, self._is_hard = read, plain, reference, is_hard
        self.batch = batch

    def __call__(self, **kwargs: Any) -> Any:
        """Run the policy, then the reference; the output's log-probs come multiplied by the masks."""
        if not kwargs.get("fused_lm_head"):
            return self._plain(**kwargs)
        output, self.masks = self._read(kwargs)
        width = self.masks.tokens.shape[1]
        policy = output.log_probs[:, -width:]
        reference = self._reference(self.batch)[:, -width:].to(policy.device)
        mask = self.masks.kept.to(policy.dtype) if self._is_hard else self.masks.soft
        self.mask = mask.to(policy.device)
        output.log_probs, kept = masked_logps(policy, reference, self.mask)
        self.batch["ref_chosen_logps"], self.batch["ref_rejected_logps"] = kept.sum(1).chunk(2)
        self.logps = policy.detach().sum(1)
        return output


class LogProbs:
    """A model that keeps the `log_probs` of its last forward."""

    log_probs: Tensor

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, **kwargs: Any) -> Any:
        """Run the model."""
        output = self._model(**kwargs)
        self.log_probs = output.log_probs
        return output
