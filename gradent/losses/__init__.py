"""Preference losses and their weights `d_w`, `d_l`: `losses.get("dpo", beta=0.1)`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from gradent.errors import InputError
from gradent.losses.base import Loss
from gradent.losses.custom import from_callable
from gradent.losses.designs import Design, PairwiseNormalized, TokenMasked
from gradent.losses.table import CPO, DPO, DPOP, IPO, KTO, RDPO, RRHF, SPPO, SimPO, SLiC

__all__ = ["DESIGNS", "LOSSES", "Loss", "available", "from_callable", "get"]

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
        name: one of `available()`, or of `DESIGNS`.
        **hyper: the loss's hyperparameters (`beta`, `lam`, `alpha`, `gamma`, `delta`, `lambda_w`, `lambda_l`,
            `z_ref`, `length_normalized`, `reference_free`; each loss takes some of them). What is not given has the
            default of the paper's Appendix C, or TRL's; see the loss's class. A design takes `base`, a name
            (by default "dpo") with that loss's hyperparameters beside it, or a `Loss`; "pairwise_normalized" also
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
    if not isinstance(name, str) or name not in LOSSES:
        known = [*LOSSES, *DESIGNS]
        raise InputError(
            f"losses.get: unknown loss {name!r}{_suggest(name, known)} Accepted: {', '.join(known)}; "
            "for any other loss use losses.from_callable."
        )
    _refuse_unknown(name, hyper, _defaults(LOSSES[name]))
    return LOSSES[name](**hyper)


def _get_design(name: str, hyper: dict[str, Any]) -> Loss:
    base = hyper.get("base", "dpo")
    accepted = {key: value for key, value in _defaults(DESIGNS[name]).items() if key != "base"}
    of_design = {key: value for key, value in hyper.items() if key in accepted}
    of_base = {key: value for key, value in hyper.items() if key not in accepted and key != "base"}
    if isinstance(base, str):
        if base not in LOSSES:
            raise InputError(
                f"losses.get: {name} has base {base!r}{_suggest(base, LOSSES)} Accepted: {', '.join(LOSSES)}, or a "
                "Loss."
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
                f"losses.get: {name} has no hyperparameter {parameter!r}{_suggest(parameter, accepted)} "
                f"Accepted, with defaults: {shown}."
            )


def _suggest(received: object, accepted: Iterable[str]) -> str:
    # 0.7: at difflib's default, 0.6, TRL's "sigmoid" (which is dpo) would be taken for simpo.
    close = difflib.get_close_matches(str(received).lower(), list(accepted), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else "."
