"""What is watched of a training run, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from gradent.hooks.piggyback.pairing import Pairing
from gradent.kernels.common.budget import DEFAULT_BUDGET
from gradent.model.sharding import find_owners

__all__ = ["WatchConfig"]


@dataclass(frozen=True, kw_only=True, eq=False)
class WatchConfig:
    """What is watched, and how; a parameter's number is its place in `parameters`.

    Attributes:
        model: the model that the trainer calls, unwrapped.
        parameters: all its trainable parameters by name.
        budget: bytes that the reductions' tiles may take.
        pairing: which rows of a forward are chosen, which rejected.
        weight: parameter number -> square root of the preconditioner's diagonal, or None.
        has_entries: measure Gram entries too; without, only coefficients are read.
        is_trusted: the loss sees log-probs alone, whatever else the model is asked for.
        should_share: give the trainer's backward the weight gradients that the measured products add up to.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    budget: int = DEFAULT_BUDGET
    pairing: Pairing = "halves"
    weight: Callable[[int], Tensor] | None = None
    has_entries: bool = True
    is_trusted: bool = False
    should_share: bool = False

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The parameters by number."""
        return list(self.parameters.values())

    @cached_property
    def names(self) -> list[str]:
        """The parameters' names by number."""
        return list(self.parameters)

    @cached_property
    def sharded(self) -> dict[nn.Module, dict[str, int]]:
        """Modules with sharded parameters (FSDP2), each with `{attribute: parameter number}`."""
        return find_owners(self.model, self.tensors)

    def list_names(self, numbers: Iterable[int]) -> str:
        """The names of some parameters, for a message."""
        names = [self.names[number] for number in sorted(numbers)]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
