"""The losses of TRL's DPOTrainer by TRL's names, as a pair has them: `losses.get("robust", label_smoothing=0.1)`.

The letters are those of `gradent.losses.base`. The formulas are those of TRL 1.16; weights are their derivatives, by
`torch.func.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gradent.errors import InputError
from gradent.losses.base import LENGTHS, REFERENCE, Loss, PairTerms

__all__ = ["NOT_OF_PAIRS", "TRL_TYPES", "TRLLoss"]

NOT_OF_PAIRS = {
    "aot": "it sorts the log-ratios of the batch",
    "aot_unpaired": "it sorts the log-ratios of the batch",
    "sft": "it is a mean over the tokens of the batch",
}
"""TRL's losses that are not sums over pairs, with the reason; the callback measures them in a run."""

_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@final
@dataclass(frozen=True, kw_only=True)
class TRLLoss(Loss):
    """A loss of `DPOConfig`, or a weighted sum of several.

    Attributes:
        loss_type: TRL's names, such as `("robust",)`.
        loss_weights: a weight each; all 1 where not given.
        beta: β > 0, as `DPOConfig(beta=)`.
        label_smoothing: ε of `robust` and `exo_pair`, and of `sigmoid`, where TRL has ignored it since 0.29.
        f_divergence_type: `DPOConfig(f_divergence_type=)`: what the log-ratios of `sigmoid`, `hinge`, `ipo`, ... go
            through.
        f_alpha_divergence_coef: α of "alpha_divergence".
        discopop_tau: τ of `discopop`.
    """

    name: str = field(default="trl", init=False)
    loss_type: tuple[str, ...]
    loss_weights: tuple[float, ...] = ()
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        for each in self.loss_type:
            if each in NOT_OF_PAIRS:
                raise InputError(
                    f"TRL's {each} is no loss of a pair: {NOT_OF_PAIRS[each]}. EntanglementCallback measures it in a "
                    "run; an audit takes another loss (--loss)."
                )
            if each not in TRL_TYPES:
                raise InputError(f"TRLLoss: loss_type {each!r}; accepted: {', '.join(TRL_TYPES)}.")
        if not self.loss_type or len(self.loss_weights) not in (0, len(self.loss_type)):
            raise InputError(
                f"TRLLoss: {len(self.loss_type)} loss_type and {len(self.loss_weights)} loss_weights; accepted is one "
                "type or more, and as many weights or none."
            )
        if self.f_divergence_type not in _DIVERGENCES:
            raise InputError(
                f"TRLLoss: f_divergence_type {self.f_divergence_type!r}; accepted: {', '.join(_DIVERGENCES)}."
            )
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        terms = [each if w == 1 else f"{w:g} {each}" for each, w in zip(self.loss_type, weights, strict=True)]
        object.__setattr__(self, "name", " + ".join(terms))
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"{self.name}: label_smoothing is {self.label_smoothing!r}; accepted: 0 to below 0.5.")

    def _uses(self) -> Sequence[str]:
        return (*REFERENCE, *LENGTHS) if {"ipo", "sigmoid_norm"} & {*self.loss_type} else REFERENCE

    def _weights(self, terms: PairTerms) -> tuple[Tensor, Tensor]:
        def total(s_w: Tensor, s_l: Tensor) -> Tensor:
            return self._value(PairTerms({**terms.given, "chosen_logp": s_w, "rejected_logp": s_l})).sum()

        with torch.enable_grad():
            chosen, rejected = torch.func.grad(total, argnums=(0, 1))(terms.s_w, terms.s_l)
        return -chosen, rejected

    def _value(self, terms: PairTerms) -> Tensor:
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        ratios = terms.s_w - terms.r_w, terms.s_l - terms.r_l
        values = [w * TRL_TYPES[each](self, terms, *ratios) for each, w in zip(self.loss_type, weights, strict=True)]
        return torch.stack(values).sum(0)

    def scores(self, ratios: Sequence[Tensor]) -> list[Tensor]:
        """The log-ratios as the f-divergence has them."""
        if self.f_divergence_type == "forward_kl":
            return [1 - torch.exp(-ratio) for ratio in ratios]
        if self.f_divergence_type == "js_divergence":
            return [math.log(2) + logsigmoid(ratio) for ratio in ratios]
        shift = self.f_alpha_divergence_coef - 1
        if self.f_divergence_type == "alpha_divergence" and abs(shift) >= 1e-6:
            return [(torch.exp((shift * ratio).clamp(max=80.0)) - 1) / shift for ratio in ratios]
        return list(ratios)


def _logit(loss: TRLLoss, w: Tensor, v: Tensor) -> Tensor:
    """`β(φ(log-ratio of chosen) - φ(log-ratio of rejected))`."""
    chosen, rejected = loss.scores((w, v))
    return loss.beta * (chosen - rejected)


def _mean_margin(loss: TRLLoss, terms: PairTerms, w: Tensor, v: Tensor) -> Tensor:
    """The difference of the scores, each averaged over its tokens."""
    chosen, rejected = loss.scores((w, v))
    return chosen / terms.n_w - rejected / terms.n_l


def _sigmoid(loss: TRLLoss, terms: PairTerms, w: Tensor, v: Tensor) -> Tensor:
    epsilon, logit = loss.label_smoothing, _logit(loss, w, v)
    return -(1 - epsilon) * logsigmoid(logit) - epsilon * logsigmoid(-logit)


def _exo(loss: TRLLoss, terms: PairTerms, w: Tensor, v: Tensor) -> Tensor:
    # TRL sets an ε of 0 to 1e-3.
    epsilon, logit = loss.label_smoothing or 1e-3, _logit(loss, w, v)
    chosen = torch.sigmoid(logit) * (logsigmoid(logit) - math.log1p(-epsilon))
    return chosen + torch.sigmoid(-logit) * (logsigmoid(-logit) - math.log(epsilon))


def _nca(loss: TRLLoss, terms: PairTerms, w: Tensor, v: Tensor) -> Tensor:
    chosen, rejected = loss.beta * w, loss.beta * v
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _robust(loss: TRLLoss, terms: PairTerms, w: Tensor, v: Tensor) -> Tensor:
    epsilon, logit = loss.label_smoothing, _logit(loss, w, v)
    return (-(1 - epsilon) * logsigmoid(logit) + epsilon * logsigmoid(-logit)) / (1 - 2 * epsilon)


def _apo_down(loss: TRLLoss, terms: PairTerms, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(loss.beta * w) + 1 - torch.sigmoid(loss.beta * (w - v))


def _discopop(loss: TRLLoss, terms: PairTerms, w: Tensor, v: Tensor) -> Tensor:
    logit = _logit(loss, w, v)
    mixed = torch.sigmoid(logit / loss.discopop_tau)
    return -logsigmoid(logit) * (1 - mixed) + torch.exp(-logit) * mixed


TRL_TYPES: dict[str, Callable[[TRLLoss, PairTerms, Tensor, Tensor], Any]] = {
    "sigmoid": _sigmoid,
    "hinge": lambda loss, _, w, v: torch.relu(1 - _logit(loss, w, v)),
    "ipo": lambda loss, terms, w, v: (_mean_margin(loss, terms, w, v) - 1 / (2 * loss.beta)) ** 2,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "robust": _robust,
    "bco_pair": lambda loss, _, w, v: -logsigmoid(loss.beta * w) - logsigmoid(-loss.beta * v),
    "sppo_hard": lambda loss, _, w, v: (w - 0.5 / loss.beta) ** 2 + (v + 0.5 / loss.beta) ** 2,
    "apo_zero": lambda loss, _, w, v: 1 - torch.sigmoid(loss.beta * w) + torch.sigmoid(loss.beta * v),
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": lambda loss, terms, w, v: -logsigmoid(loss.beta * _mean_margin(loss, terms, w, v)),
}  # fmt: skip
"""TRL's name of a loss to its value, `[B]`; `w` and `v` are the log-ratios of chosen and rejected."""
