"""What is watched of a training run, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from gradent.hooks.piggyback.pairing import Pairing
from gradent.kernels.common.account import ElementMetric
from gradent.kernels.common.budget import DEFAULT_BUDGET
from gradent.model.sharding import find_owners

__all__ = ["RowStore", "StepMetric", "WatchConfig"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepMetric:
    """What a step's account takes of the optimizer."""

    metric: Callable[[int], ElementMetric]  # of a parameter, by number, without the gradient before
    weighted: Sequence[str]  # sources of its directions that the preconditioner multiplies
    plain: Sequence[str]  # and of those that it does not
    store: RowStore = field(default_factory=lambda: RowStore(0))  # of rows' gradients, where there is room for them


class RowStore:
    """Room for the gradients of a step's rows, in bytes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held = 0

    def reserve(self, size: int) -> bool:
        """Whether so many bytes more have room; they are held then, until `clear`."""
        if self._held + size > self._budget:
            return False
        self._held += size
        return True

    def clear(self) -> None:
        """The step is over."""
        self._held = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class WatchConfig:
    """What is watched, and how; a parameter's number is its place in `parameters`."""

    model: nn.Module  # which the trainer calls, unwrapped
    parameters: Mapping[str, Tensor] = field(default_factory=dict)  # all trainable ones, by name
    budget: int = DEFAULT_BUDGET  # bytes that the reductions' tiles may take
    pairing: Pairing = "halves"  # which rows of a forward are chosen, which rejected
    weight: Callable[[int], Tensor] | None = None  # parameter number -> square root of the preconditioner's diagonal
    # Measure all products of a backward's rows in the optimizer's metric, too: asked when a backward starts.
    step: Callable[[], StepMetric | None] | None = None
    has_entries: bool = True  # measure Gram entries too; without, only coefficients are read
    is_trusted: bool = False  # the loss sees log-probs alone, whatever else the model is asked for
    should_share: bool = False  # the trainer's backward takes the weight gradients that measured products add up to

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
