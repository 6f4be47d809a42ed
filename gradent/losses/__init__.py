"""Preference losses and their weights `d_w`, `d_l`: `losses.get("dpo", beta=0.1)`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from gradent.errors import InputError
from gradent.losses.base import Loss
from gradent.losses.custom import from_callable
from gradent.losses.table import CPO, DPO, DPOP, IPO, KTO, RDPO, RRHF, SPPO, SimPO, SLiC

__all__ = ["LOSSES", "Loss", "available", "from_callable", "get"]

LOSSES: dict[str, type[Loss]] = {
    "dpo": DPO,
    "rdpo": RDPO,
    "simpo": SimPO,
    "ipo": IPO,
    "rrhf": RRHF,
    "slic": SLiC,
    "cpo": CPO,
    "dpop": DPOP,
    "kto": KTO,
    "sppo": SPPO,
}
"""Name to class, in the order of the paper's Table 2."""


def available() -> list[str]:
    """The names that `get` knows, in the order of the paper's Table 2.

    Returns:
        Ten names.
    """
    return list(LOSSES)


def get(name: str, **hyper: Any) -> Loss:
    """The loss of that name with these hyperparameters.

    Args:
        name: one of `available()`.
        **hyper: the loss's hyperparameters (`beta`, `lam`, `alpha`, `gamma`, `delta`, `lambda_w`, `lambda_l`,
            `z_ref`, `length_normalized`, `reference_free`; each loss takes some of them). What is not given has the
            default of the paper's Appendix C, or TRL's; see the loss's class.

    Returns:
        A frozen `Loss`.

    Raises:
        InputError: the name is unknown, the loss has no such hyperparameter, or its value is not accepted.

    Example:
        >>> get("dpo", beta=0.1)
        DPO(name='dpo', beta=0.1)
    """
    if not isinstance(name, str) or name not in LOSSES:
        raise InputError(
            f"losses.get: unknown loss {name!r}{_suggest(name, LOSSES)} Accepted: {', '.join(LOSSES)}; "
            "for any other loss use losses.from_callable."
        )
    accepted = {each.name: each.default for each in fields(LOSSES[name]) if each.init}
    for parameter in hyper:
        if parameter not in accepted:
            raise InputError(
                f"losses.get: {name} has no hyperparameter {parameter!r}{_suggest(parameter, accepted)} "
                f"Accepted, with defaults: {', '.join(f'{key}={value!r}' for key, value in accepted.items())}."
            )
    return LOSSES[name](**hyper)


def _suggest(received: object, accepted: Iterable[str]) -> str:
    # 0.7: at difflib's default, 0.6, TRL's "sigmoid" (which is dpo) would be taken for simpo.
    close = difflib.get_close_matches(str(received).lower(), list(accepted), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else "."
