"""What is watched of a training run, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from gradent.hooks.piggyback.pairing import Grouping, Pairing, PairingEvidence
from gradent.kernels.common.account import ElementMetric
from gradent.kernels.common.budget import DEFAULT_BUDGET
from gradent.model.sharding import find_owners

__all__ = ["RowStore", "StepMetric", "WatchConfig"]

LEAST_WIDTH, MOST_WIDTH = 2**10, 2**16
"""Numbers of a sketch: below, its error is more than 3% of two rows' norms, and above less than half a percent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepMetric:
    """What a step's account takes of the optimizer."""

    metric: Callable[[int], ElementMetric]  # of a parameter, by number, without the gradient before
    weighted: Sequence[str]  # sources of its directions that the preconditioner multiplies
    plain: Sequence[str]  # and of those that it does not
    store: RowStore = field(default_factory=lambda: RowStore(0))  # of rows' gradients, where there is room for them
    # By parameter number, `lr · fresh` of the step over the largest of all; None where their signs differ.
    rates: Callable[[], list[float] | None] = lambda: None
    seed: Callable[[], int] = lambda: 0  # of the step's sketches


class RowStore:
    """Room for what is kept of a step's rows, in bytes: their gradients, or else sketches of these.

    A step has `backwards` backwards on each of `ranks` ranks, of about as many rows each.
    """

    def __init__(self, budget: int, *, backwards: int = 1, ranks: int = 1) -> None:
        self._budget, self._backwards, self._ranks = budget, backwards, ranks
        self._held = self._seen = 0
        self._has_sketches = False

    def reserve(self, size: int) -> bool:
        """Whether the gradients of another backward's rows have room, and those to come; they are held then."""
        to_come = max(1, self._backwards - self._seen)
        self._seen += 1
        if self._has_sketches or self._held + size * to_come > self._budget:
            return False
        self._held += size
        return True

    def sketch_width(self, rows: int, numbers: int) -> int:
        """K of the sketches of this backward's rows, whose gradients of so many numbers had no room; 0 for none."""
        if self._backwards * self._ranks == 1 or self._seen > self._backwards:
            return 0  # all rows of the step meet in this backward; or nothing is known of how many there will be
        # A parameter's part is made beside the sketches of its backward.
        room = (self._budget - self._held) // (4 * max(1, rows) * (self._backwards * self._ranks + 1))
        if room < LEAST_WIDTH:
            return 0
        self._has_sketches = True
        return min(MOST_WIDTH, _power_below(room), _power_below(numbers))

    def clear(self) -> None:
        """The step is over."""
        self._held = self._seen = 0
        self._has_sketches = False


def _power_below(number: int) -> int:
    """The largest power of two that is not larger: sketches of such widths fold into one another."""
    return 1 << (number.bit_length() - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class WatchConfig:
    """What is watched, and how; a parameter's number is its place in `parameters`."""

    model: nn.Module  # which the trainer calls, unwrapped
    parameters: Mapping[str, Tensor] = field(default_factory=dict)  # all trainable ones, by name
    budget: int = DEFAULT_BUDGET  # bytes that the reductions' tiles may take
    pairing: Pairing | None = "halves"  # which rows of a forward are chosen, which rejected; None where the data says
    evidence: PairingEvidence = field(default_factory=PairingEvidence)  # what it has said so far
    grouping: Grouping = field(default_factory=lambda: Grouping("prompts"))  # of rows that are no pairs
    temperature: float = 1.0  # the loss's log-probs are of logits over it
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
