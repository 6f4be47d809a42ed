"""The two designs of the paper's Section 5 as losses: what a verdict, an audit and the trainers share of them.

Each stands on another loss, its `base`, by default DPO with β = 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gradent.errors import InputError
from gradent.losses.base import NORMS, Loss, PairTerms
from gradent.losses.table import DPO

__all__ = [
    "NEGLIGIBLE", "SCALES", "Design", "PairwiseNormalized", "TokenMasked", "counting", "normalized_weights",
    "rebalanced_weights",
]  # fmt: skip

SCALES = ("loss", "weight", "constant")
"""What `C_i` may be: see `PairwiseNormalized`."""

NEGLIGIBLE = 1e-6
"""Share of the other gradient's norm up to which a norm counts as zero: what is left of a gradient that cancels, in
float32, and would be blown up by its inverse."""


def counting(chosen_norm: Tensor, rejected_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Of chosen and of rejected, bool `[B]`: whether the norm is more than `NEGLIGIBLE` of the other one."""
    return chosen_norm > NEGLIGIBLE * rejected_norm, rejected_norm > NEGLIGIBLE * chosen_norm


def normalized_weights(
    chosen_norm: Tensor, rejected_norm: Tensor, d_w: Tensor, d_l: Tensor, *, scale: str, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of `g_w` and `-g_l` in a normalized step: `C_i/‖g_w‖` and `C_i/‖g_l‖`.

    Args:
        chosen_norm: `‖g_w‖` of B pairs, float64 `[B]`.
        rejected_norm: `‖g_l‖`, float64 `[B]`.
        d_w: the loss's own weight of `g_w`, float64 `[B]`.
        d_l: its own weight of `-g_l`, float64 `[B]`.
        scale: one of `SCALES`.
        factor: `C`.

    Returns:
        `(of g_w, of -g_l, C_i)`, float64 `[B]` each. A gradient of norm zero (or `NEGLIGIBLE` beside the other) has
        weight 0; with `scale="loss"`, what is left of the pair is the loss's own step.
    """
    has_chosen, has_rejected = counting(chosen_norm, rejected_norm)
    chosen_norm, rejected_norm = chosen_norm.where(has_chosen, 0.0), rejected_norm.where(has_rejected, 0.0)
    if scale == "loss":
        # ‖g_w/‖g_w‖ - g_l/‖g_l‖‖² = 2(1 - cos), or 1 where one of them is zero
        sides = (has_chosen.double() + has_rejected.double()).clamp_min(1)
        scales = (d_w * chosen_norm + d_l * rejected_norm) / sides
    else:
        scales = (d_w + d_l) / 2 if scale == "weight" else torch.ones_like(chosen_norm)
    scales = factor * scales
    return (scales / chosen_norm).where(has_chosen, 0.0), (scales / rejected_norm).where(has_rejected, 0.0), scales


def rebalanced_weights(d_w: Tensor, d_l: Tensor, log_ratio: Tensor | float) -> tuple[Tensor, Tensor]:
    """`d_w` times and `d_l` divided by the factor at which the logarithm of their ratio is `log_ratio`."""
    # Source: Reward Calibration (Wu et al. 2026), α = exp(½ (log r* − log r)).
    alpha = (0.5 * (log_ratio - (d_w / d_l).log())).exp()
    return alpha * d_w, d_l / alpha


@dataclass(frozen=True, kw_only=True)
class Design(Loss):
    """A loss that stands on another one: unless it says otherwise, its arguments, value and weights are that one's.

    Attributes:
        base: the other one.
    """

    base: Loss = field(default_factory=DPO)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.base, Loss) or isinstance(self.base, Design):
            raise InputError(
                f"{self.name}: base is {self.base!r}; accepted is a loss that is no design itself: "
                "losses.get('dpo', beta=0.1), or losses.from_callable(fn)."
            )

    def _uses(self) -> Sequence[str]:
        return self.base._uses()  # noqa: SLF001  (here and below: of another Loss)

    def _reads(self) -> Sequence[str]:
        return self.base._reads()  # noqa: SLF001

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        return self.base._weights(terms)  # noqa: SLF001

    def _value(self, terms: PairTerms) -> Tensor:
        return self.base._value(terms)  # noqa: SLF001


@final
@dataclass(frozen=True, kw_only=True)
class PairwiseNormalized(Design):
    """Pairwise normalized gradient descent (Section 5.1): `d_w = C_i/‖g_w‖`, `d_l = C_i/‖g_l‖`.

    It is a rule for steps, not the gradient of a function: `value` is that of the base, and `weights` needs the norms
    of the pair's two gradients, which `verdict` takes from its gram. With `C_i > 0` every pair is in case 1, whatever
    its cosine: chosen changes by `C_i‖g_w‖(1 - cos)`, rejected by `-C_i‖g_l‖(1 - cos)`.

    Attributes:
        base: the loss whose `d_w`, `d_l` give `C_i`.
        scale: "loss": `C_i = C(d_w‖g_w‖ + d_l‖g_l‖)/2`, as `PairwiseNormalizedDPOTrainer` has it by default; "weight":
            `C(d_w + d_l)/2`, the paper's DPO*; "constant": `C`, the paper's own statement, whatever the base says.
        C: a factor, > 0.
    """

    name: str = field(default="pairwise_normalized", init=False)
    scale: str = "loss"
    C: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in SCALES:
            raise InputError(f"{self.name}: scale is {self.scale!r}; accepted: {', '.join(map(repr, SCALES))}.")

    @property
    def needs_norms(self) -> bool:
        """True: `weights` requires `chosen_norm` and `rejected_norm`."""
        return True

    def _uses(self) -> Sequence[str]:
        return () if self.scale == "constant" else super()._uses()

    def _reads(self) -> Sequence[str]:
        return (*super()._reads(), *NORMS)

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        d_w, d_l = (terms.s_w, terms.s_l) if self.scale == "constant" else super()._weights(terms)  # or not looked at
        chosen, rejected = (terms.given[name] for name in NORMS)
        c_w, c_l, _ = normalized_weights(chosen, rejected, d_w, d_l, scale=self.scale, factor=self.C)
        return c_w, c_l

    def _value(self, terms: PairTerms) -> Tensor:
        missing = [argument for argument in super()._uses() if argument not in terms.given]
        if missing:
            raise InputError(f"{self.name}: the value is that of {self.base.name}, which needs {', '.join(missing)}.")
        return super()._value(terms)


@final
@dataclass(frozen=True, kw_only=True)
class TokenMasked(Design):
    """The base on kept tokens alone (Section 5.2): its value and weights at log-probs that are sums over kept tokens.

    All that a caller gives is of kept tokens: log-probs, the reference's, and lengths. A gram of them is what `measure`
    gives for a `PairBatch` whose `completion_mask` marks kept tokens only; its verdict speaks of the kept log-probs,
    and is exact for hard masks. The penalty `η·s` of the mask is no function of log-probs, and is no part of it:
    `gradent.losses.token_masked` has the whole loss, of scores.

    Attributes:
        base: the loss.
    """

    name: str = field(default="token_masked", init=False)
