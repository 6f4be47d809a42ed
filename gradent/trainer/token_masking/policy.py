"""A policy whose log-probs are masked, for a loss that knows nothing of masks.

Letters: N = 2B rows, rows 0..B-1 chosen and B..2B-1 rejected; K predicted tokens a row; u scores, m masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradent.errors import ModelError
from gradent.losses.token_masked import hard_mask, masked_logps, soft_mask
from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
from gradent.trainer.token_masking.head import MaskHead

__all__ = ["MaskedPolicy", "TokenMasks", "mask_tokens", "read_masks"]


@dataclass(frozen=True, kw_only=True)
class TokenMasks:
    """Scores and masks of a batch's tokens, `[N, K]` each."""

    tokens: Tensor  # the responses' tokens, bool; elsewhere the others mean nothing
    scores: Tensor  # u
    soft: Tensor  # `σ(k(u - r))`
    kept: Tensor  # `u >= r`, bool


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


@dataclass(kw_only=True, eq=False, repr=False)
class MaskedPolicy:
    """Called in the policy's place, it gives kept log-probs, and puts the reference's into the batch."""

    read: Callable[[Mapping[str, Any]], tuple[Any, TokenMasks]]  # runs the policy with its masks
    plain: Any  # the policy as it is
    reference: Callable[[Mapping[str, Any]], Tensor]  # gives the reference's log-probs `[N, K]`
    batch: dict[str, Any]  # TRL's, with the reference's kept log-probs of each response once the policy was called
    is_hard: bool
    masks: TokenMasks = field(init=False)  # those of the batch's tokens
    mask: Tensor = field(init=False)  # m, what log-probs were multiplied by
    logps: Tensor = field(init=False)  # `log π(y|x)` of whole responses, `[N]`, without gradient

    def __call__(self, **kwargs: Any) -> Any:
        """Run the policy, then the reference; the output's log-probs come multiplied by the masks."""
        if not kwargs.get("fused_lm_head"):
            return self.plain(**kwargs)
        output, self.masks = self.read(kwargs)
        width = self.masks.tokens.shape[1]
        policy = output.log_probs[:, -width:]
        reference = self.reference(self.batch)[:, -width:].to(policy.device)
        mask = self.masks.kept.to(policy.dtype) if self.is_hard else self.masks.soft
        self.mask = mask.to(policy.device)
        output.log_probs, kept = masked_logps(policy, reference, self.mask)
        self.batch["ref_chosen_logps"], self.batch["ref_rejected_logps"] = kept.sum(1).chunk(2)
        self.logps = policy.detach().sum(1)
        return output
