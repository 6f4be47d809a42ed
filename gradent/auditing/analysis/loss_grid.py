"""Which losses a what-if asks about, and what they are called: the run's own, the paper's ten, and sweeps of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from gradent.losses import LOSSES, Loss
from gradent.losses.trl import TRLLoss

__all__ = ["SWEEPS", "Variant", "describe_setting", "label_loss", "list_variants", "read_hyperparameters"]

NAMES = {
    "dpo": "DPO", "rdpo": "R-DPO", "simpo": "SimPO", "ipo": "IPO", "rrhf": "RRHF", "slic": "SLiC-HF", "cpo": "CPO",
    "dpop": "DPOP", "kto": "KTO", "sppo": "SPPO", "pairwise_normalized": "Pairwise normalized",
    "token_masked": "Token-masked",
}  # fmt: skip
"""How the paper writes the losses of `LOSSES`; any other loss goes by its own name."""

LETTERS = {
    "beta": "β", "lam": "λ", "alpha": "α", "gamma": "γ", "delta": "δ", "lambda_w": "λ_w", "lambda_l": "λ_l",
    "z_ref": "z",
}  # fmt: skip
"""How the paper writes the hyperparameters of the losses."""

Hyperparameters = dict[str, Any]

SWEEPS: tuple[tuple[str, str, tuple[Hyperparameters, ...]], ...] = (
    ("dpo", "beta", tuple({"beta": value} for value in (0.01, 0.05, 0.1, 0.3, 0.5))),
    ("rdpo", "alpha", tuple({"alpha": value} for value in (0.05, 0.1, 0.2, 0.5, 1.0))),
    # SimPO's scripts give γ/β; here, as in the loss, γ stands inside the sigmoid: γ/β is 0.5, 0.55 and 0.3.
    ("simpo", "beta", ({"beta": 2.0, "gamma": 1.0}, {"beta": 2.5, "gamma": 1.375}, {"beta": 10.0, "gamma": 3.0})),
    ("ipo", "beta", tuple({"beta": value} for value in (0.01, 0.1, 0.5, 1.0))),
    ("ipo", "length_normalized", ({"length_normalized": False}, {"length_normalized": True})),
    ("rrhf", "lam", tuple({"lam": value} for value in (0.0, 0.01, 0.1, 0.5, 1.0))),
    ("slic", "lam", tuple({"lam": value} for value in (0.0, 0.1, 0.5, 1.0))),
    ("slic", "delta", tuple({"delta": value} for value in (0.1, 0.5, 1.0, 2.0))),
    ("cpo", "lam", tuple({"lam": value} for value in (0.0, 0.01, 0.1, 0.5, 1.0))),
    ("dpop", "lam", tuple({"lam": value} for value in (0.0, 0.5, 5.0, 50.0, 500.0))),
    ("kto", "lambda_l", tuple({"lambda_l": value} for value in (0.5, 0.75, 1.0, 1.33, 2.0))),
    ("sppo", "beta", tuple({"beta": value} for value in (0.001, 0.01, 0.1, 1.0))),
    ("sppo", "reference_free", ({"reference_free": False}, {"reference_free": True})),
)
"""Loss, the hyperparameter that is varied, and the settings tried: values that papers and trainers use or search.

λ starts at 0, where the loss has no term for the chosen response's own log-likelihood. What a setting does not name
stays at the loss's default or, in a sweep of the run's own loss, as the run has it.
"""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One loss to ask about."""

    group: str  # "run" (the run's own loss), "paper" (one of the ten at the paper's Appendix C) or "sweep"
    loss: Loss  # the loss
    varied: str | None = None  # the hyperparameter that the sweep varies; None outside sweeps


def list_variants(loss: Loss) -> Iterator[Variant]:
    """All losses of a what-if, in the order of its rows."""
    yield Variant(group="run", loss=loss)
    for kind in LOSSES.values():
        yield Variant(group="paper", loss=kind())
    for name, varied, settings in SWEEPS:
        base = loss if type(loss) is LOSSES[name] else LOSSES[name]()
        for setting in settings:
            yield Variant(group="sweep", loss=replace(base, **setting), varied=varied)


def read_hyperparameters(loss: Loss) -> Hyperparameters:
    """The hyperparameters of a loss as JSON has them."""
    values: Hyperparameters = {}
    for field in fields(loss):
        value = getattr(loss, field.name)
        if not field.init or field.name == "name":
            continue
        if isinstance(value, Loss):  # of a design, its base's stand beside its own
            values |= {field.name: value.name, **read_hyperparameters(value)}
        elif isinstance(value, str | Real):
            values[field.name] = value if isinstance(value, bool | int | str) else float(value)
    return values


def label_loss(loss: Loss) -> str:
    """A loss as tables name it, such as "IPO (β=0.1, length-normalized)"; a switch that is off is left out."""
    base = getattr(loss, "base", None)
    if isinstance(base, Loss):
        names = [field.name for field in fields(loss) if field.init and field.name != "base"]
        default = type(loss)()
        values = {name: getattr(loss, name) for name in names if getattr(loss, name) != getattr(default, name)}
        changed = describe_setting(values)
        return f"{NAMES[loss.name]} {label_loss(base)}" + (f", {changed}" if changed else "")
    values = read_hyperparameters(loss)
    if isinstance(loss, TRLLoss):  # its many switches are named where they are not TRL's defaults
        usual = read_hyperparameters(TRLLoss(loss_type=loss.loss_type))
        values = {name: value for name, value in values.items() if name == "beta" or value != usual[name]}
    shown = describe_setting({name: value for name, value in values.items() if value is not False})
    return NAMES.get(loss.name, loss.name) + (f" ({shown})" if shown else "")


def describe_setting(setting: Mapping[str, Any]) -> str:
    """Hyperparameters in the paper's letters, such as "β=2, γ=1" or "not reference-free"; empty for none."""
    return ", ".join(_describe(name, value) for name, value in setting.items())


def _describe(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return ("" if value else "not ") + name.replace("_", "-")
    return f"{LETTERS.get(name, name.replace('_', ' '))}={value if isinstance(value, str) else format(value, 'g')}"
