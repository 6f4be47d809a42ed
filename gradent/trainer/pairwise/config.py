"""The options of `PairwiseNormalizedDPOTrainer`, and what cannot be exact with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl.trainer.dpo_config import DPOConfig

from gradent import losses
from gradent.errors import InputError
from gradent.kernels.common.budget import parse_budget
from gradent.losses.designs import SCALES
from gradent.trainer.common.trl_requirements import refuse_options, require_trl

__all__ = ["PairwiseNormalizedDPOConfig"]

_REFUSED = {
    "ld_alpha": "it weighs the tokens of a response differently, so that what it trains is no gradient of log π(y|x)",
    "use_liger_kernel": "Liger's layers hide their weights' gradients",
    "activation_offloading": "offloaded activations can be fetched for one backward only, and there are two",
    "torch_compile": "a compiled graph can be run backward once only, and there are two backwards",
    "deepspeed": "parameters or gradients are sharded over ranks",
    "fsdp": "parameters are sharded over ranks",
    "fsdp_config": "parameters are sharded over ranks",
}
"""Options that cannot be exact."""

_ONE_SIDED = {
    "apo_down": "it lowers the log-prob of chosen on purpose, which this trainer raises",
    "sft": "it has no part on rejected that could be balanced",
}
"""TRL's losses that have no two sides, where they stand alone."""


@dataclass
class PairwiseNormalizedDPOConfig(DPOConfig):
    """`DPOConfig`, and how long a pair's step is.

    Args:
        scale: what `C_i` is. "loss": `C (d_w‖g_w‖ + d_l‖g_l‖)/2`, so that learning rates carry over from DPO; "weight":
            `C (d_w + d_l)/2`, the paper's DPO* (`C_i = β σ(-βΔ)`), whose learning rate is to be adjusted; "constant":
            `C`, whatever the loss says.
        C: a factor, > 0.
        preference_loss: name of a loss of `gradent.losses` that gives `d_w` and `d_l` ("simpo", "cpo", ...); by default
            they are those of TRL's own loss (`loss_type` and what belongs to it). The reported loss stays TRL's.
        preference_loss_kwargs: that loss's hyperparameters; `beta` is not taken from the config.
        memory_budget: scratch of the reductions, as in `measure`.

    Raises:
        InputError: an option that is not accepted or cannot be exact, or a release of TRL that is too old.
    """

    _VALID_DICT_FIELDS = [*getattr(DPOConfig, "_VALID_DICT_FIELDS", ()), "preference_loss_kwargs"]  # noqa: RUF012

    scale: str = field(default="loss", metadata={"help": "What C_i is.", "choices": list(SCALES)})
    C: float = field(default=1.0, metadata={"help": "Factor of C_i."})
    preference_loss: str | None = field(
        default=None, metadata={"help": "Loss of gradent.losses that gives d_w and d_l; by default TRL's own."}
    )
    preference_loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyperparameters of preference_loss."}
    )
    memory_budget: str | None = field(default=None, metadata={"help": "Scratch of the reductions, such as 256MiB."})

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        require_trl("pairwise normalization")
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.scale not in SCALES:
            raise InputError(f"scale={self.scale!r} is unknown; accepted are {', '.join(map(repr, SCALES))}.")
        if isinstance(self.C, bool) or not isinstance(self.C, (int, float)) or not math.isfinite(self.C) or self.C <= 0:
            raise InputError(f"C={self.C!r}; accepted is a finite number > 0.")
        parse_budget(self.memory_budget)
        if self.preference_loss is None and self.preference_loss_kwargs:
            raise InputError("preference_loss_kwargs without preference_loss; name the loss that they belong to.")
        self.make_loss()
        self._check_options()

    def make_loss(self) -> losses.Loss | None:
        """The loss that gives the weights.

        Returns:
            The loss, or None for TRL's own.

        Raises:
            InputError: the loss or one of its hyperparameters is unknown.
        """
        if self.preference_loss is None:
            return None
        if isinstance(self.preference_loss_kwargs, str):
            raise InputError("preference_loss_kwargs is text; accepted is a dict (or JSON on a command line).")
        if self.preference_loss not in losses.LOSSES:
            raise InputError(
                f"preference_loss={self.preference_loss!r}: unknown loss; accepted are {', '.join(losses.LOSSES)}."
            )
        return losses.get(self.preference_loss, **(self.preference_loss_kwargs or {}))

    def _check_options(self) -> None:
        refuse_options(self, _REFUSED, "pairwise normalization cannot be exact")
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # the new name, the old one
            kwargs = getattr(self, f"{name}_kwargs", None)
            if getattr(self, name, None) and isinstance(kwargs, Mapping) and kwargs.get("use_reentrant"):
                raise InputError(
                    f"{name}_kwargs={kwargs!r}: reentrant checkpointing hides its layers' gradients from the first of "
                    "two backwards. Use {'use_reentrant': False}."
                )
        if self.preference_loss is not None:
            if self.use_weighting:
                raise InputError(
                    f"use_weighting=True belongs to TRL's own loss, and preference_loss={self.preference_loss!r} takes "
                    "its place. Leave one of them out."
                )
            return
        for name, why in _ONE_SIDED.items():
            if name in self.loss_type and (name == "apo_down" or set(self.loss_type) == {name}):
                raise InputError(f"loss_type={self.loss_type!r}: no pairwise normalized form of {name}, since {why}.")
