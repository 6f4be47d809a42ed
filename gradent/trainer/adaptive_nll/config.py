"""The options of `AdaptiveNLLDPOTrainer`, and what its weight cannot be told for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trl.trainer.dpo_config import DPOConfig

from gradent.errors import InputError
from gradent.kernels.common.budget import parse_budget
from gradent.trainer.common.trl_requirements import option, refuse_options, require_number, require_trl

__all__ = ["METHOD", "AdaptiveNLLDPOConfig"]

METHOD = "the adaptive likelihood term"

_REFUSED: Mapping[str, str] = {
    "ld_alpha": "it weighs the tokens of a response differently, and the account is of whole responses",
    "use_weighting": "it weighs the likelihood term too",
    "use_liger_kernel": "TRL has no sum of losses there",
}
_ONE_SIDED = {"apo_down": "it lowers chosen on purpose", "sft": "the trainer adds that term itself"}


@dataclass
class AdaptiveNLLDPOConfig(DPOConfig):
    """`DPOConfig`, and how the weight of the likelihood term follows the steps.

    Args:
        nll_smoothing: what a step's figures still count for in the next one, in [0, 1). The weight is a ratio of sums
            over the last `1 / (1 - nll_smoothing)` steps or so.
        nll_rate: what a nat that chosen has fallen below the reference, on average over a step's batch, adds to the
            weight, >= 0; 0 to go by the account alone.
        nll_target: nats above the reference at which chosen's mean log-prob is held; responses that are not trained on
            end somewhat below it.
        nll_max_weight: the largest weight, > 0; 1 is what RPO takes throughout.
        memory_budget: scratch of the account, as in `EntanglementCallback`.

    Raises:
        InputError: an option that is not accepted, or a release of TRL that is too old.
    """

    nll_smoothing: float = option(0.9, "What a step's figures still count for in the next one.")
    nll_rate: float = option(0.05, "What a nat that chosen has fallen adds to the weight.")
    nll_target: float = option(0.25, "Nats above the reference at which chosen is held.")
    nll_max_weight: float = option(1.0, "Largest weight of the likelihood term.")
    memory_budget: str | None = option(None, "Scratch of the account, such as 256MiB.")

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        require_trl(METHOD)
        super().__post_init__()  # type: ignore[no-untyped-call]
        require_number(self, "nll_smoothing", lambda x: 0 <= x < 1, "a number in [0, 1)")
        require_number(self, "nll_rate", lambda x: x >= 0, "a finite number >= 0")
        require_number(self, "nll_target", lambda x: True, "a finite number")
        require_number(self, "nll_max_weight", lambda x: x > 0, "a finite number > 0")
        parse_budget(self.memory_budget)
        sharding = "the optimizer's state is sharded over ranks"
        refuse_options(self, _REFUSED, f"{METHOD} cannot be told", sharding=sharding)
        for kind in self.loss_type:  # a list by now
            if kind in _ONE_SIDED:
                raise InputError(f"loss_type={self.loss_type!r}: with {kind!r} {_ONE_SIDED[kind]}. Leave it out.")
