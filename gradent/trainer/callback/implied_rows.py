"""What a trainer's configuration says of the rows of its batches: pairs, groups, or nothing that can be measured."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from gradent.hooks.piggyback.pairing import Groups, Pairing

__all__ = ["ImpliedRows", "implied_rows"]


@dataclass(frozen=True, kw_only=True)
class ImpliedRows:
    """How the rows of a trainer's batches belong together; the defaults let the data say it."""

    pairing: Pairing | None = None
    groups: Groups | None = None
    temperature: float = 1.0
    refusal: str | None = None  # why there is nothing to measure


_PUSHED_UP = "every row is pushed up: there are no pairs and no groups here"
_TEACHER = "every row is drawn to a teacher's distribution, and none is pushed up or down as a whole"

_REFUSED = {
    "SFTConfig": _PUSHED_UP, "SSDConfig": _PUSHED_UP,
    "PRMConfig": "its labels are of steps, and no row is pushed up or down as a whole",
    "GKDConfig": _TEACHER, "GOLDConfig": _TEACHER, "DistillationConfig": _TEACHER, "AsyncDistillationConfig": _TEACHER,
    "ServerDistillationConfig": _TEACHER, "SDFTConfig": _TEACHER, "IWOPDConfig": _TEACHER,
    "MiniLLMConfig": _TEACHER,
    "AsyncGRPOConfig": "its rollouts share their prompts' tokens in one packed row, and cannot be told apart",
    "PPOConfig": "each token has an advantage of its own, and the value model's loss comes on top",
}  # fmt: skip
"""Name of a configuration to why nothing is measured under it."""

_PAIRED = {"DPOConfig", "CPOConfig", "ORPOConfig", "RewardConfig"}
_BATCHED = {"KTOConfig", "BCOConfig", "A2POConfig", "NashMDConfig"}
"""Rows of prompts of their own: the loss contrasts all rows of a batch."""


_TRAINERS = {"PairwiseTrainer": "RewardConfig"}
"""Trainers that are named after no configuration: LLaMA-Factory's of reward models."""


def implied_rows(args: TrainingArguments, trainer: object | None = None) -> ImpliedRows:
    """What a trainer's arguments say, by the names of their classes, the nearest first; else what its own class is."""
    # LLaMA-Factory gives TRL's trainers arguments that are none of TRL's.
    names = [kind.__name__ for kind in type(args).__mro__]
    for kind in type(trainer).__mro__ if trainer is not None else ():
        named = kind.__name__.removesuffix("Trainer") + "Config"
        names.append(_TRAINERS.get(kind.__name__, named if kind.__name__.endswith("Trainer") else ""))
    for name in names:
        found = _by_name(name, args)
        if found is not None:
            return found
    return ImpliedRows()


def _by_name(name: str, args: TrainingArguments) -> ImpliedRows | None:
    """What a configuration of this name says; None where the name says nothing."""
    if name in _REFUSED:
        return ImpliedRows(refusal=_REFUSED[name])
    if name == "SDPOConfig":  # beside its teacher it can have GRPO's loss, and that alone
        is_grpo = getattr(args, "distillation_weight", 1.0) == 0
        return _rollouts(args) if is_grpo else ImpliedRows(refusal=_TEACHER)
    if name == "OnlineDPOConfig":
        return ImpliedRows(pairing="either")
    if name == "TPOConfig":  # the third block, a likelihood of its own, is left out where it has no weight
        return ImpliedRows(pairing="thirds" if getattr(args, "tpo_alpha", 1.0) != 0 else "halves")
    if name in _PAIRED:
        return ImpliedRows(pairing="halves")
    if name in _BATCHED:
        return ImpliedRows(pairing="rows", groups="batch")
    if name == "XPOConfig":  # the model's own response and its reference's, in forwards of their own
        return ImpliedRows(pairing="rows", groups="prompts")
    if name in ("GRPOConfig", "RLOOConfig"):
        return _rollouts(args)
    return None


def _rollouts(args: TrainingArguments) -> ImpliedRows:
    """Several responses to each prompt, drawn at a temperature."""
    return ImpliedRows(pairing="rows", groups="prompts", temperature=getattr(args, "temperature", 1.0) or 1.0)
