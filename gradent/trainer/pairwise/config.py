"""The options of `PairwiseNormalizedDPOTrainer`, and what cannot be exact with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl.trainer.dpo_config import DPOConfig

from gradent import losses
from gradent.errors import InputError
from gradent.kernels.common.budget import parse_budget
from gradent.losses.designs import SCALES
from gradent.trainer.common.trl_requirements import option, refuse_options, require_choice, require_number, require_trl

__all__ = ["METHOD", "PairwiseNormalizedDPOConfig"]

METHOD = "pairwise normalization"

_REFUSED = {
    "ld_alpha": "it weighs the tokens of a response differently, so that what it trains is no gradient of log π(y|x)",
    "use_liger_kernel": "Liger's layers hide their weights' gradients",
    "activation_offloading": "offloaded activations can be fetched for one backward only, and there are two",
    "torch_compile": "a compiled graph can be run backward once only, and there are two backwards",
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

    scale: str = option("loss", "What C_i is.", choices=list(SCALES))
    C: float = option(1.0, "Factor of C_i.")
    preference_loss: str | None = option(None, "Loss of gradent.losses that gives d_w and d_l; by default TRL's own.")
    preference_loss_kwargs: dict[str, Any] | str | None = option(None, "Hyperparameters of preference_loss.")  # noqa: RUF009
    memory_budget: str | None = option(None, "Scratch of the reductions, such as 256MiB.")

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        require_trl(METHOD)
        super().__post_init__()  # type: ignore[no-untyped-call]
        require_choice(self, "scale", SCALES)
        require_number(self, "C", lambda x: x > 0, "a finite number > 0")
        parse_budget(self.memory_budget)
        if self.preference_loss is None and self.preference_loss_kwargs:
            raise InputError("preference_loss_kwargs without preference_loss; name the loss that they belong to.")
        self.make_loss()
        sharding = "parameters or gradients are sharded over ranks"
        refuse_options(self, _REFUSED, "pairwise normalization cannot be exact", sharding=sharding)
        self._check_checkpointing()
        self._check_loss()

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

    def _check_checkpointing(self) -> None:
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # the new name, the old one
            kwargs = getattr(self, f"{name}_kwargs", None)
            if getattr(self, name, None) and isinstance(kwargs, Mapping) and kwargs.get("use_reentrant"):
                raise InputError(
                    f"{name}_kwargs={kwargs!r}: reentrant checkpointing hides its layers' gradients from the first of "
                    "two backwards. Use {'use_reentrant': False}."
                )

    def _check_loss(self) -> None:
        if self.preference_loss is not None:
            if self.use_weighting:
                raise InputError(
                    f"use_weighting=True belongs to TRL's own loss, and preference_loss={self.preference_loss!r} takes "
                    "its place. Leave one of them out."
                )
            return
        for name, reason in _ONE_SIDED.items():
            if name in self.loss_type and (name == "apo_down" or set(self.loss_type) == {name}):
                raise InputError(
                    f"loss_type={self.loss_type!r}: no pairwise normalized form of {name}, since {reason}."
                )
