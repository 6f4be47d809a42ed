"""The loss that a run was trained with, as far as its training_args.bin says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gradent import losses
from gradent.errors import InputError
from gradent.loading.training_args import read_arguments, read_trained

__all__ = ["RunLoss", "choose_loss", "read_run_loss"]

_OF_DPO = (
    "loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
    "discopop_tau",
)  # fmt: skip
_PREFERENCES = ("CPOConfig", "ORPOConfig", "KTOConfig", "DPOConfig")
_UNSEEN = ("ld_alpha", "use_weighting", "rpo_alpha", "reference_free")
"""Arguments under which a pair's loss weighs tokens or has other terms, so that no `Loss` here is the run's."""


@dataclass(frozen=True, kw_only=True)
class RunLoss:
    """What a run's files say of its loss."""

    told: str  # as its trainer's arguments have it
    loss: losses.Loss | None  # None where gradent has no such loss
    why_not: str = ""  # the reason, then


def read_run_loss(model: str) -> RunLoss | None:
    """The loss of a run's directory or checkpoint; None where its files do not say."""
    place = Path(model)
    checkpoints = sorted(place.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    above = [place.parent] if re.fullmatch(r"checkpoint-\d+", place.name) else []
    for directory in (place, *checkpoints, *above):
        given = read_arguments(directory / "training_args.bin", (*_OF_DPO, *_UNSEEN, "simpo_gamma", "cpo_alpha"))
        if given:
            return _describe(given, read_trained([str(directory)]).release)
    return None


def choose_loss(asked: Any, hyper: Mapping[str, Any], run: RunLoss | None) -> tuple[losses.Loss, list[str]]:
    """The loss that an audit judges, and what there is to say of it; `asked` is a name, a `Loss` or None."""
    if isinstance(asked, losses.Loss):
        return asked, _differs(asked, run)
    if asked is not None and not isinstance(asked, str):
        raise InputError(f"loss is a {type(asked).__name__}; accepted: a name that losses.get knows, or a Loss.")
    if asked is None and run is not None and run.loss is not None:
        known = {field.name for field in fields(run.loss) if field.init}
        if not set(hyper) <= known:
            name, *_ = sorted(set(hyper) - known)
            raise InputError(
                f"the run was trained with {run.told}, which has no hyperparameter {name!r}. Name the loss that it is "
                "for (--loss)."
            )
        return replace(run.loss, **hyper), [f"The loss is the run's own: {run.told} (--loss for another)."]
    if asked is None:
        loss = losses.get("dpo", **hyper)
        return loss, [] if run is None else [f"The run was trained with {run.told}: {run.why_not}. Judged is dpo."]
    if asked == "ipo" and "length_normalized" not in hyper and run is not None:
        loss = losses.get("ipo", **{"length_normalized": True, **hyper})
        note = "IPO is judged as TRL has it, averaged over tokens (--no-length-normalized for the paper's form)."
        return loss, [note, *_differs(loss, run)]
    loss = losses.get(asked, **hyper)
    return loss, _differs(loss, run)


def _differs(loss: losses.Loss, run: RunLoss | None) -> list[str]:
    if run is None or run.loss == loss:
        return []
    return [f"The run was trained with {run.told}; what is judged is {loss}, as asked."]


def _describe(given: Mapping[str, Any], release: str | None) -> RunLoss | None:
    """A run's arguments as a loss; None where it is no preference trainer of TRL's that gradent can name."""
    kind, kinds = str(given.get("class")), given.get("loss_type")
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kind == "CPOConfig" and kinds == ("simpo",) and given.get("cpo_alpha") == 0 and "beta" in given:
        gamma = given.get("simpo_gamma", 0.5)
        told = f"CPOConfig(loss_type='simpo', beta={given['beta']:g}, simpo_gamma={gamma:g}, cpo_alpha=0)"
        return RunLoss(told=told, loss=losses.get("simpo", beta=given["beta"], gamma=gamma))
    if kind != "DPOConfig" or not isinstance(kinds, tuple) or not kinds:
        why = "gradent cannot read its loss from the run's files"
        return RunLoss(told=kind, loss=None, why_not=why) if kind in _PREFERENCES else None
    told = ", ".join(f"{name}={_shown(given[name])}" for name in ("loss_type", "beta") if name in given)
    told = f"DPOConfig({told})"
    weighs = [name for name in _UNSEEN if given.get(name) not in (None, False)]
    if weighs:
        why = f"its {' and '.join(weighs)} has no closed form in a pair's log-probs"
        return RunLoss(told=told, loss=None, why_not=why)
    old = release is None or tuple(map(int, release.split(".")[:2])) < (0, 29)
    hyper = {name: given[name] for name in _OF_DPO[1:] if given.get(name) is not None}
    if hyper.get("f_divergence_type") != "alpha_divergence":
        hyper.pop("f_alpha_divergence_coef", None)  # whose default has changed
    if not old and "robust" not in kinds and "exo_pair" not in kinds:
        hyper.pop("label_smoothing", None)  # TRL has ignored it there since 0.29
    try:
        return RunLoss(told=told, loss=losses.from_trl(kinds, hyper))
    except InputError as error:
        return RunLoss(told=told, loss=None, why_not=str(error).rstrip("."))


def _shown(value: Any) -> str:
    return repr(value[0] if isinstance(value, tuple) and len(value) == 1 else value)
