"""What the trainers of Section 5 ask of TRL, of their options and of the run, and how they say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import Any, TypeVar

import trl
import trl.trainer.utils
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from gradent.errors import InputError

__all__ = [
    "make_config", "option", "reference_in_batch", "refuse_options", "require_choice", "require_number", "require_trl",
    "require_unsharded",
]  # fmt: skip

C = TypeVar("C", bound=DPOConfig)


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A config's field, with the text that a command line shows of it."""
    return field(default=default, metadata={"help": text, **metadata})


def require_trl(method: str) -> None:
    """Raise an `InputError` where TRL's DPOTrainer is not built as a method needs it."""
    lacking = [name for name in ("_compute_loss", "compute_ref_log_probs") if not hasattr(DPOTrainer, name)]
    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
        lacking.append("the fused head that returns log_probs")
    if lacking:
        raise InputError(
            f"TRL {trl.__version__} is installed, whose DPOTrainer lacks {', '.join(lacking)}; {method} needs TRL 1.15 "
            "or newer. pip install 'trl>=1.15'."
        )


def refuse_options(config: DPOConfig, refused: Mapping[str, str], trouble: str, *, sharding: str) -> None:
    """Raise an `InputError` where an option is set that has a reason against it, or one that shards the model."""
    for name, reason in {**refused, **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), sharding)}.items():
        value = getattr(config, name, None)
        is_unset = value is None or value is False or value in ("", [], {})  # 0.0 is set: ld_alpha=0.0 means something
        if not is_unset and not (name == "fsdp_config" and not config.fsdp):
            raise InputError(f"{name}={value!r}: {trouble} with it, since {reason}. Leave it out.")


def require_choice(config: DPOConfig, name: str, choices: Sequence[str]) -> None:
    """Raise an `InputError` where an option is none of its choices."""
    value = getattr(config, name)
    if value not in choices:
        raise InputError(f"{name}={value!r} is unknown; accepted are {', '.join(map(repr, choices))}.")


def require_number(config: DPOConfig, name: str, accepts: Callable[[float], bool], accepted: str) -> None:
    """Raise an `InputError` where an option is no finite number that `accepts` is true of."""
    value = getattr(config, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not accepts(value):
        raise InputError(f"{name}={value!r}; accepted is {accepted}.")


def make_config(args: Any, kind: type[C], method: str) -> C:
    """A trainer's config: what was passed as `args`, or the default; an `InputError` where it is of another kind."""
    require_trl(method)
    if args is not None and not isinstance(args, kind):
        raise InputError(f"args is a {type(args).__name__}; accepted is a {kind.__name__}.")
    return kind() if args is None else args


@contextmanager
def reference_in_batch(trainer: Any, is_there: bool = True) -> Iterator[None]:
    """Inside, TRL's loss takes the reference's log-probs from the batch instead of running the reference."""
    before, trainer.precompute_ref_logps = trainer.precompute_ref_logps, is_there
    try:
        yield
    finally:
        trainer.precompute_ref_logps = before


def require_unsharded(trainer: Any, need: str, images: str) -> None:
    """Raise an `InputError` where a run is split in ways that a method cannot see through, or its data holds images."""
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU") or trainer.accelerator.parallelism_config is not None:
        raise InputError(
            f"the run is distributed as {kind}; {need} on each rank: accepted are one process, or several under DDP "
            "without tensor, context or sequence parallelism."
        )
    if trainer._is_vision_dataset:  # noqa: SLF001  (TRL has no public name for it)
        raise InputError(f"the data holds images, {images}; accepted is text alone.")
