"""Preference losses and their weights `d_w`, `d_l`: `losses.get("dpo", beta=0.1)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from gradent.errors import InputError
from gradent.losses.base import Loss
from gradent.losses.custom import from_callable
from gradent.losses.designs import Design, PairwiseNormalized, TokenMasked
from gradent.losses.table import CPO, DPO, DPOP, IPO, KTO, RDPO, RRHF, SPPO, SimPO, SLiC
from gradent.losses.trl import NOT_OF_PAIRS, TRL_TYPES, TRLLoss
from gradent.text import suggest

__all__ = ["DESIGNS", "LOSSES", "Loss", "available", "from_callable", "from_trl", "get"]

_TABLE_2: tuple[type[Loss], ...] = (DPO, RDPO, SimPO, IPO, RRHF, SLiC, CPO, DPOP, KTO, SPPO)

LOSSES: dict[str, type[Loss]] = {loss.__name__.lower(): loss for loss in _TABLE_2}
"""Name, the class's in lower case, to class, in the order of the paper's Table 2."""

DESIGNS: dict[str, type[Design]] = {"pairwise_normalized": PairwiseNormalized, "token_masked": TokenMasked}
"""Name to class of the designs of the paper's Section 5, each on a loss of `LOSSES`."""


def available() -> list[str]:
    """The losses that `get` knows, in the order of the paper's Table 2; it knows the two of `DESIGNS` as well.

    Returns:
        Ten names.
    """
    return list(LOSSES)


def get(name: str, **hyper: Any) -> Loss:
    """The loss of that name with these hyperparameters.

    Args:
        name: one of `available()`, of `DESIGNS`, or TRL's name of a loss of its DPOTrainer ("sigmoid", which is "dpo",
            "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
            "sigmoid_norm"). "ipo" is the paper's form; TRL's, which averages over tokens, has `length_normalized=True`.
        **hyper: the loss's hyperparameters (`beta`, `lam`, `alpha`, `gamma`, `delta`, `lambda_w`, `lambda_l`,
            `z_ref`, `length_normalized`, `reference_free`, `label_smoothing`; each loss takes some). What is not given
            has the default of the paper's Appendix C, or TRL's; see the loss's class. A design takes `base`, a name (by
            default "dpo") with that loss's hyperparameters beside it, or a `Loss`; "pairwise_normalized" also
            `scale` and `C`.

    Returns:
        A frozen `Loss`.

    Raises:
        InputError: the name is unknown, the loss has no such hyperparameter, or its value is not accepted.

    Example:
        >>> get("dpo", beta=0.1)
        DPO(name='dpo', beta=0.1)
        >>> get("token_masked", beta=0.2)
        TokenMasked(name='token_masked', base=DPO(name='dpo', beta=0.2))
    """
    if isinstance(name, str) and name in DESIGNS:
        return _get_design(name, hyper)
    if isinstance(name, str) and name in {*TRL_TYPES, *NOT_OF_PAIRS} - {*LOSSES}:
        return from_trl(name, hyper)
    if not isinstance(name, str) or name not in LOSSES:
        known, trl = [*LOSSES, *DESIGNS], [each for each in TRL_TYPES if each not in LOSSES]
        raise InputError(
            f"losses.get: unknown loss {name!r}{suggest(name, [*known, *trl])} Accepted: {', '.join(known)}; TRL's "
            f"names {', '.join(trl)}; in Python, losses.from_callable for any other loss."
        )
    _refuse_unknown(name, hyper, _defaults(LOSSES[name]))
    return LOSSES[name](**hyper)


def from_trl(loss_type: str | Sequence[str], hyper: Mapping[str, Any]) -> Loss:
    """The loss of a `DPOConfig` with these of its arguments.

    Args:
        loss_type: TRL's name, or several.
        hyper: `loss_weights`, `beta`, `label_smoothing`, `f_divergence_type`, `f_alpha_divergence_coef`,
            `discopop_tau`, as `DPOConfig` has them.

    Returns:
        One of the paper's losses where it is that ("sigmoid" is DPO, "ipo" is length-normalized IPO, "sppo_hard" is
        SPPO, "apo_zero" is KTO with z = 0), else a `TRLLoss`.

    Raises:
        InputError: a name or an argument that is unknown, or a loss that is none of pairs ("aot", "sft").
    """
    kinds = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    accepted = {name: value for name, value in _defaults(TRLLoss).items() if name != "loss_type"}
    _refuse_unknown("+".join(kinds), hyper, accepted)
    given = {name: value for name, value in hyper.items() if value != accepted[name] or name == "beta"}
    if set(given) <= {"beta"} and kinds == ("sigmoid",):
        return DPO(**given)
    if set(given) <= {"beta"} and kinds == ("ipo",):
        return IPO(**given, length_normalized=True)
    if set(given) <= {"beta"} and kinds == ("sppo_hard",):
        return SPPO(**given)
    if set(given) <= {"beta"} and kinds == ("apo_zero",):
        return KTO(**given)
    return TRLLoss(loss_type=kinds, **hyper)


def _get_design(name: str, hyper: dict[str, Any]) -> Loss:
    base = hyper.get("base", "dpo")
    accepted = {key: value for key, value in _defaults(DESIGNS[name]).items() if key != "base"}
    of_design = {key: value for key, value in hyper.items() if key in accepted}
    of_base = {key: value for key, value in hyper.items() if key not in accepted and key != "base"}
    if isinstance(base, str):
        if base not in LOSSES:
            raise InputError(
                f"losses.get: {name} has base {base!r}{suggest(base, LOSSES)} Accepted: {', '.join(LOSSES)}, or a Loss."
            )
        _refuse_unknown(f"{name} on {base}", of_base, {**accepted, **_defaults(LOSSES[base])})
        base = LOSSES[base](**of_base)
    else:
        _refuse_unknown(f"{name} on a base that is given whole", of_base, accepted)
    return DESIGNS[name](base=base, **of_design)


def _defaults(loss: type[Loss]) -> dict[str, Any]:
    """The hyperparameters of a loss with their defaults."""
    return {hyper.name: hyper.default for hyper in fields(loss) if hyper.init}


def _refuse_unknown(name: str, hyper: Iterable[str], accepted: Mapping[str, Any]) -> None:
    for parameter in hyper:
        if parameter not in accepted:
            shown = ", ".join(f"{key}={value!r}" for key, value in accepted.items()) or "none"
            raise InputError(
                f"losses.get: {name} has no hyperparameter {parameter!r}{suggest(parameter, accepted)} "
                f"Accepted, with defaults: {shown}."
            )
