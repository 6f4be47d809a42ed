"""The options of `TokenMaskedDPOTrainer`, and what cannot work with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from trl.trainer.dpo_config import DPOConfig

from gradent.errors import InputError
from gradent.trainer.common.trl_requirements import option, refuse_options, require_choice, require_number, require_trl

__all__ = ["METHOD", "Anneal", "TokenMaskedDPOConfig"]

METHOD = "token masking"

Anneal = Literal["linear", "exponential", "none"]

_LOSSES = (
    "sigmoid", "hinge", "robust", "exo_pair", "bco_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip
"""TRL's losses that are functions of the two responses' log-ratios, which masking sums over kept tokens."""

_REFUSED_LOSSES = {
    "ipo": "it divides by the length of the whole response",
    "sigmoid_norm": "it divides by the length of the whole response",
    "aot": "it sorts the log-probs of policy and reference apart, so that no token has a log-ratio",
    "aot_unpaired": "it pairs responses of different prompts by their rank in the batch",
    "sft": "it is no function of log-ratios",
}

_REFUSED = {
    "precompute_ref_log_probs": "TRL keeps the reference's log-prob of a response, and masks need those of its tokens",
    "ld_alpha": "it weighs tokens by their position, which is the mask's task",
    "use_weighting": "it weighs pairs by the log-probs of whole responses, of which a mask leaves a part",
    "padding_free": "it puts many responses into one row, and the masks are made row by row",
    "use_liger_kernel": "it exchanges parts of the model that the head reads from",
    "torch_compile": "the hidden states that the head reads are not there in a compiled model",
}
"""Options that cannot work, or were never tried."""

_REFUSED_OPTIMIZERS = ("lomo", "layerwise", "muon")  # they take no further group of parameters

_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "mask_eta": (lambda x: x >= 0, "a finite number >= 0"), "mask_threshold": (lambda x: True, "a finite number"),
    "mask_k_start": (lambda x: x > 0, "a finite number > 0"), "mask_k_end": (lambda x: x > 0, "a finite number > 0"),
    "mask_init": (lambda x: 0.5 < x < 1, "a number above 0.5 and below 1"),
    "mask_learning_rate": (lambda x: x >= 0, "None or a finite number >= 0"),
}  # fmt: skip
"""What each number has to be, as a test and in words."""


@dataclass
class TokenMaskedDPOConfig(DPOConfig):
    """`DPOConfig`, and how tokens are masked.

    Args:
        mask_eta: η >= 0, the weight of the sparsity term: the mean of all responses' mean mask, between 0 and 1. In a
            response of n tokens one kept token costs η/(2n), and gains about β/2 for each nat of its log-ratio
            while the margin is near 0. Too large a η empties all masks, and the loss
            stays at log 2: watch `mask/kept_*`.
        mask_threshold: r; a token is kept where its score is r or more.
        mask_k_start: k at the first step, > 0, of the soft mask `σ(k(u - r))`.
        mask_k_end: k at the last step, > 0.
        mask_anneal: how k goes from one to the other over the steps: "linear", "exponential", or "none" (k stays at
            `mask_k_start`). Masks near 0 and 1 have hardly any gradient, the less the larger k: the defaults let scores
            that never moved still learn at the end of a run in float32.
        mask_init: what all masks are at the start, between 0.5 and 1.
        mask_hidden: width of the head's hidden layer; 0 for a linear head.
        mask_learning_rate: of the head, under the run's own schedule; it has no weight decay. None for the policy's,
            which is too small for a head that learns from nothing.
        mask_detach: whether the policy is kept from learning through the scores (the masks' effect on its log-probs
            reaches it all the same).
        mask_hard_eval: evaluate with `I{u >= r}` in place of the soft mask.
        mask_freeze: all masks are 1 and stay so, the head does not learn, and `mask_eta` must be 0: DPO to the bit, for
            comparisons.

    Raises:
        InputError: an option that is not accepted or cannot work, or a release of TRL that is too old.
    """

    mask_eta: float = option(0.01, "Weight of the sparsity term.")
    mask_threshold: float = option(0.0, "A token is kept where its score is this or more.")
    mask_k_start: float = option(1.0, "Sharpness of the soft mask at the first step.")
    mask_k_end: float = option(5.0, "Sharpness of the soft mask at the last step.")
    mask_anneal: str = option("linear", "How the sharpness changes.", choices=list(get_args(Anneal)))
    mask_init: float = option(0.9, "What all masks are at the start.")
    mask_hidden: int = option(0, "Width of the head's hidden layer; 0 for a linear head.")
    mask_learning_rate: float | None = option(1e-3, "Learning rate of the head.")
    mask_detach: bool = option(True, "Keep the policy from learning through the scores.")
    mask_hard_eval: bool = option(True, "Evaluate with hard masks.")
    mask_freeze: bool = option(False, "All masks are 1 and stay so: plain DPO.")

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        require_trl(METHOD)
        super().__post_init__()  # type: ignore[no-untyped-call]
        require_choice(self, "mask_anneal", get_args(Anneal))
        for name, (accepts, accepted) in _NUMBERS.items():
            if name != "mask_learning_rate" or self.mask_learning_rate is not None:
                require_number(self, name, accepts, accepted)
        if not isinstance(self.mask_hidden, int) or isinstance(self.mask_hidden, bool) or self.mask_hidden < 0:
            raise InputError(f"mask_hidden={self.mask_hidden!r}; accepted is a whole number >= 0.")
        if self.mask_freeze and self.mask_eta:
            raise InputError(
                f"mask_freeze=True with mask_eta={self.mask_eta!r}: masks that stay 1 cannot become sparse. Set "
                "mask_eta=0, or leave mask_freeze out."
            )
        sharding = "the head is no part of the model that is sharded"
        refuse_options(self, _REFUSED, "token masking cannot work", sharding=sharding)
        for name in self.loss_type:
            if name not in _LOSSES:
                reason = _REFUSED_LOSSES.get(name, "it is not known here")
                raise InputError(
                    f"loss_type={self.loss_type!r}: no token-masked form of {name}, since {reason}. Accepted are "
                    f"{', '.join(_LOSSES)}."
                )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if any(name in optimizer for name in _REFUSED_OPTIMIZERS):
            raise InputError(
                f"optim={optimizer!r} takes no parameters beside the model's, and the head has some. Use another, such "
                "as 'adamw_torch'."
            )

    @property
    def start_score(self) -> float:
        """The score at which a soft mask is `mask_init` under `mask_k_start`."""
        return self.mask_threshold + math.log(self.mask_init / (1 - self.mask_init)) / self.mask_k_start

    def k_at(self, step: int, steps: int) -> float:
        """The sharpness at a step.

        Args:
            step: optimizer steps that were taken already.
            steps: those of the whole run; 0 where it has not begun.

        Returns:
            k: `mask_k_start` at the first step of a run, `mask_k_end` at its last and from there on.
        """
        progress = 0.0 if steps <= 0 else min(1.0, step / max(1, steps - 1))
        if self.mask_anneal == "none":
            return self.mask_k_start
        if self.mask_anneal == "exponential":
            return float(self.mask_k_start * (self.mask_k_end / self.mask_k_start) ** progress)
        return self.mask_k_start + progress * (self.mask_k_end - self.mask_k_start)
