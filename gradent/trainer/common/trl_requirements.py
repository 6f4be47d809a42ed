"""What the trainers of Section 5 ask of TRL, of their options and of the run, and how they say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trl
import trl.trainer.utils
from trl.trainer.dpo_trainer import DPOTrainer

from gradent.errors import InputError

__all__ = ["refuse_options", "require_config", "require_trl", "require_whole"]


def require_trl(method: str) -> None:
    """Raise where TRL's DPOTrainer is not built as these trainers need it.

    Args:
        method: what needs it, in words.

    Raises:
        InputError: a release of TRL that is too old.
    """
    lacking = [name for name in ("_compute_loss", "compute_ref_log_probs") if not hasattr(DPOTrainer, name)]
    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
        lacking.append("the fused head that returns log_probs")
    if lacking:
        raise InputError(
            f"TRL {trl.__version__} is installed, whose DPOTrainer lacks {', '.join(lacking)}; {method} needs TRL 1.15 "
            "or newer. pip install 'trl>=1.15'."
        )


def refuse_options(config: Any, refused: Mapping[str, str], trouble: str) -> None:
    """Raise where an option is set that a method does not go with.

    Args:
        config: a `DPOConfig`.
        refused: why, by option.
        trouble: what is wrong with such an option, in words.

    Raises:
        InputError: one of them is set.
    """
    for name, why in refused.items():
        value = getattr(config, name, None)
        unset = value is None or value is False or value in ("", [], {})  # 0.0 is not: ld_alpha=0.0 means something
        if not unset and not (name == "fsdp_config" and not config.fsdp):
            raise InputError(f"{name}={value!r}: {trouble} with it, since {why}. Leave it out.")


def require_config(args: Any, kind: type) -> None:
    """Raise where a trainer is given another config than its own.

    Args:
        args: what was given.
        kind: the trainer's config.

    Raises:
        InputError: something else.
    """
    if not isinstance(args, kind):
        raise InputError(f"args is a {type(args).__name__}; accepted is a {kind.__name__}.")


def require_whole(trainer: Any, need: str, images: str) -> None:
    """Raise where a run is split in ways that a method cannot see through, or where its data holds images.

    Args:
        trainer: TRL's, set up.
        need: which method needs what of each rank, in words.
        images: why there can be no images, in words.

    Raises:
        InputError: such a run.
    """
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU") or trainer.accelerator.parallelism_config is not None:
        raise InputError(
            f"the run is distributed as {kind}; {need} on each rank: accepted are one process, or several under DDP "
            "without tensor, context or sequence parallelism."
        )
    if trainer._is_vision_dataset:  # noqa: SLF001  (TRL has no public name for it)
        raise InputError(f"the data holds images, {images}; accepted is text alone.")
