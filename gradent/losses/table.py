"""The paper's Table 2 as ten classes, each in the form its own paper and published script derive.

The letters are those of `gradent.losses.base`. Where Table 2's printed form is not the loss it names, the class says
so. Default hyperparameters are the paper's Appendix C, or TRL's where it is silent; the class says which.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradent.losses.base import LENGTHS, REFERENCE, Loss, PairTerms

__all__ = ["CPO", "DPO", "DPOP", "IPO", "KTO", "RDPO", "RRHF", "SPPO", "SLiC", "SimPO"]


@dataclass(frozen=True, kw_only=True)
class _Logistic(Loss):
    """`ℓ = -log σ(a)`, where the logit a rises by β with `s_w` and falls by β with `s_l`: `d_w = d_l = β σ(-a)`."""

    beta: float = 0.1

    @abstractmethod
    def _logit(self, terms: PairTerms) -> Tensor: ...

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        weight = self.beta * torch.sigmoid(-self._logit(terms))
        return weight, weight.clone()

    def _value(self, terms: PairTerms) -> Tensor:
        return -logsigmoid(self._logit(terms))


@final
@dataclass(frozen=True, kw_only=True)
class DPO(_Logistic):
    """Rafailov et al.: `ℓ = -log σ(βΔ)`, `d_w = d_l = β σ(-βΔ)`. Table 2 prints `c_ref` without its factor β.

    Attributes:
        beta: β > 0, the strength of the pull to the reference; 0.1 in Appendix C.
    """

    name: str = field(default="dpo", init=False)

    _arguments = REFERENCE

    def _logit(self, terms: PairTerms) -> Tensor:
        return self.beta * terms.margin


@final
@dataclass(frozen=True, kw_only=True)
class RDPO(_Logistic):
    """Park et al.: `ℓ = -log σ(a)`, `a = βΔ + α(n_w - n_l)`, `d_w = d_l = β σ(-a)`.

    Table 2 prints the length term with the other sign; the objective it comes from rewards `r + α·length`, hence `+`.

    Attributes:
        beta: β > 0; 0.1, as DPO.
        alpha: α, nats a token; 0.2 in Appendix C. Negative values are accepted and give the printed sign.
    """

    name: str = field(default="rdpo", init=False)
    alpha: float = 0.2

    _arguments = REFERENCE + LENGTHS

    def _logit(self, terms: PairTerms) -> Tensor:
        return self.beta * terms.margin + self.alpha * (terms.n_w - terms.n_l)


@final
@dataclass(frozen=True, kw_only=True)
class SimPO(_Logistic):
    """Meng et al.: `ℓ = -log σ(a)`, `a = β s_w/n_w - β s_l/n_l - γ`, `d_w = (β/n_w) σ(-a)`, `d_l = (β/n_l) σ(-a)`.

    Attributes:
        beta: β > 0; 0.1, TRL's default (Appendix C does not say; SimPO's own scripts use 2 and more).
        gamma: γ >= 0, the target margin inside the sigmoid; 0.5 in Appendix C. SimPO's scripts give γ/β instead.
    """

    name: str = field(default="simpo", init=False)
    gamma: float = 0.5

    _arguments = LENGTHS

    def _logit(self, terms: PairTerms) -> Tensor:
        return self.beta * terms.mean_margin - self.gamma

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        chosen, rejected = super()._weights(terms)
        return chosen / terms.n_w, rejected / terms.n_l


@final
@dataclass(frozen=True, kw_only=True)
class IPO(Loss):
    """Azar et al.: `ℓ = (Δ - 1/(2β))²`, `d_w = d_l = 2(1/(2β) - Δ)`: negative once the margin overshoots.

    Table 2's `m` lacks the minus sign that equation (6) needs.

    Attributes:
        beta: β > 0 (the IPO paper's τ); 0.1, TRL's default (Appendix C does not say).
        length_normalized: average each log-ratio over its tokens first, as TRL does (the paper's footnote 9):
            `Δ̄ = (s_w - r_w)/n_w - (s_l - r_l)/n_l` replaces Δ, `d_w` gains `1/n_w` and `d_l` gains `1/n_l`.
    """

    name: str = field(default="ipo", init=False)
    beta: float = 0.1
    length_normalized: bool = False

    def _uses(self) -> Sequence[str]:
        return (*REFERENCE, *LENGTHS) if self.length_normalized else REFERENCE

    def _shortfall(self, terms: PairTerms) -> Tensor:
        margin = terms.margin
        if self.length_normalized:
            margin = (terms.s_w - terms.r_w) / terms.n_w - (terms.s_l - terms.r_l) / terms.n_l
        return 1 / (2 * self.beta) - margin

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        weight = 2 * self._shortfall(terms)
        if self.length_normalized:
            return weight / terms.n_w, weight / terms.n_l
        return weight, weight.clone()

    def _value(self, terms: PairTerms) -> Tensor:
        return self._shortfall(terms) ** 2


@final
@dataclass(frozen=True, kw_only=True)
class RRHF(Loss):
    """Yuan et al.: `ℓ = max(0, -a) - λ s_w`, `a = s_w/n_w - s_l/n_l`, `d_w = 1[a<0]/n_w + λ`, `d_l = 1[a<0]/n_l`.

    At the kink, a = 0, the hinge counts as inactive.

    Attributes:
        lam: λ >= 0, the weight of chosen's log-likelihood; 1 in Appendix C.
    """

    name: str = field(default="rrhf", init=False)
    lam: float = 1.0

    _arguments = LENGTHS

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        active = (terms.mean_margin < 0).to(torch.float64)
        return active / terms.n_w + self.lam, active / terms.n_l

    def _value(self, terms: PairTerms) -> Tensor:
        return (-terms.mean_margin).clamp_min(0) - self.lam * terms.s_w


@final
@dataclass(frozen=True, kw_only=True)
class SLiC(Loss):
    """Zhao et al. (SLiC-HF): `ℓ = max(0, δ - s_w + s_l) - λ s_w`, `d_w = 1[a<δ] + λ`, `d_l = 1[a<δ]`, `a = s_w - s_l`.

    At the kink, a = δ, the hinge counts as inactive.

    Attributes:
        delta: δ >= 0, the margin asked for, nats; 1 in Appendix C.
        lam: λ >= 0, the weight of chosen's log-likelihood; 1 in Appendix C.
    """

    name: str = field(default="slic", init=False)
    delta: float = 1.0
    lam: float = 1.0

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        active = (terms.s_w - terms.s_l < self.delta).to(torch.float64)
        return active + self.lam, active

    def _value(self, terms: PairTerms) -> Tensor:
        return (self.delta - terms.s_w + terms.s_l).clamp_min(0) - self.lam * terms.s_w


@final
@dataclass(frozen=True, kw_only=True)
class CPO(_Logistic):
    """Xu et al.: `ℓ = -log σ(β(s_w - s_l)) - λ s_w`, `d_w = β σ(-β(s_w - s_l)) + λ`, `d_l = β σ(-β(s_w - s_l))`.

    TRL averages the log-likelihood term over the batch's tokens; here, as in the paper, it is the sum.

    Attributes:
        beta: β > 0; 0.1, TRL's default (Appendix C does not say).
        lam: λ >= 0, the weight of chosen's log-likelihood; 1 in Appendix C.
    """

    name: str = field(default="cpo", init=False)
    lam: float = 1.0

    def _logit(self, terms: PairTerms) -> Tensor:
        return self.beta * (terms.s_w - terms.s_l)

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        chosen, rejected = super()._weights(terms)
        return chosen + self.lam, rejected

    def _value(self, terms: PairTerms) -> Tensor:
        return super()._value(terms) - self.lam * terms.s_w


@final
@dataclass(frozen=True, kw_only=True)
class DPOP(_Logistic):
    """Pal et al.: `ℓ = -log σ(a)`, `a = β(Δ - λ max(0, r_w - s_w))`.

    `d_w = β σ(-a)(1 + λ 1[s_w < r_w])`, `d_l = β σ(-a)`; at the kink, s_w = r_w, the penalty counts as inactive.
    Table 2 leaves λ outside β and takes the log of what is a log already.

    Attributes:
        beta: β > 0; 0.1, as DPO.
        lam: λ >= 0, the penalty on a chosen log-prob under the reference's; 50 in Appendix C.
    """

    name: str = field(default="dpop", init=False)
    lam: float = 50.0

    _arguments = REFERENCE

    def _logit(self, terms: PairTerms) -> Tensor:
        return self.beta * (terms.margin - self.lam * (terms.r_w - terms.s_w).clamp_min(0))

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        chosen, rejected = super()._weights(terms)
        is_penalized = (terms.s_w < terms.r_w).to(torch.float64)
        return chosen * (1 + self.lam * is_penalized), rejected


@final
@dataclass(frozen=True, kw_only=True)
class KTO(Loss):
    """Ethayarajh et al., seen as pairs: `ℓ = -λ_w σ(a_w) - λ_l σ(a_l)`, `d_w = λ_w β σ'(a_w)`, `d_l = λ_l β σ'(a_l)`.

    `a_w = β(s_w - r_w) - z`, `a_l = z - β(s_l - r_l)`. KTO's constant `λ_w + λ_l` is left out. Table 2's `h_l` lacks
    a minus sign and a β; as printed `d_l` would be negative.

    Attributes:
        beta: β > 0; 0.1, TRL's default (Appendix C does not say).
        lambda_w: λ_w >= 0, the weight of chosen; 1, TRL's default.
        lambda_l: λ_l >= 0, the weight of rejected; 1, TRL's default.
        z_ref: z, the reference point, already multiplied by β (TRL's `β·kl`), held constant; 0 unless given.
    """

    name: str = field(default="kto", init=False)
    beta: float = 0.1
    lambda_w: float = 1.0
    lambda_l: float = 1.0
    z_ref: float = 0.0

    _arguments = REFERENCE

    def _logits(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        chosen = self.beta * (terms.s_w - terms.r_w) - self.z_ref
        return chosen, self.z_ref - self.beta * (terms.s_l - terms.r_l)

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        # σ'(a) = σ(a) σ(-a): unlike σ(a)(1 - σ(a)) it keeps its digits when a is large.
        chosen, rejected = (torch.sigmoid(a) * torch.sigmoid(-a) for a in self._logits(terms))
        return self.lambda_w * self.beta * chosen, self.lambda_l * self.beta * rejected

    def _value(self, terms: PairTerms) -> Tensor:
        chosen, rejected = self._logits(terms)
        return -self.lambda_w * torch.sigmoid(chosen) - self.lambda_l * torch.sigmoid(rejected)


@final
@dataclass(frozen=True, kw_only=True)
class SPPO(Loss):
    """Wu et al.: `ℓ = (s_w - r_w - t)² + (s_l - r_l + t)²`, `d_w = 2(t - (s_w - r_w))`, `d_l = 2((s_l - r_l) + t)`.

    `t = 1/(2β)`. Either weight turns negative once its log-ratio overshoots. Table 2's `h_w` lacks a minus sign.

    Attributes:
        beta: β > 0; 0.1, TRL's default (the paper says only that 1/β is large).
        reference_free: the paper's own simplification (Section 3.2.1, Appendix A.2): no reference, and `t = 1/β`.
    """

    name: str = field(default="sppo", init=False)
    beta: float = 0.1
    reference_free: bool = False

    def _uses(self) -> Sequence[str]:
        return () if self.reference_free else REFERENCE

    def _shortfalls(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        if self.reference_free:
            return 1 / self.beta - terms.s_w, terms.s_l + 1 / self.beta
        target = 1 / (2 * self.beta)
        return target - (terms.s_w - terms.r_w), (terms.s_l - terms.r_l) + target

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        chosen, rejected = self._shortfalls(terms)
        return 2 * chosen, 2 * rejected

    def _value(self, terms: PairTerms) -> Tensor:
        chosen, rejected = self._shortfalls(terms)
        return chosen**2 + rejected**2
