"""Whether weights have moved since a look at them: some optimizers and engines step inside the trainer's backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["WeightMark"]

_PARAMETERS, _NUMBERS = 64, 8
"""Of how many parameters numbers are kept, and how many of each."""


class WeightMark:
    """A look at parameters: their versions, where they lie, and some of their numbers."""

    # Versions alone would not do: engines write through `.data` and through flat buffers, which have their own.

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        step = max(1, len(self._parameters) // _PARAMETERS) | 1  # odd: A and B of adapters alternate
        self._sampled = self._parameters[::step][:_PARAMETERS]
        self._places, self._numbers = self._look()

    def has_moved(self) -> bool:
        """Whether the parameters are other ones, or have other values, than at the look."""
        places, numbers = self._look()
        return places != self._places or any(not torch.equal(numbers[each], self._numbers[each]) for each in numbers)

    def _look(self) -> tuple[list[tuple[int, int]], dict[torch.device, Tensor]]:
        places = [(part._version, part.data_ptr()) for part in self._parameters]  # noqa: SLF001  (no public name)
        samples: dict[torch.device, list[Tensor]] = {}
        for part in self._sampled:
            flat = part.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // _NUMBERS)][:_NUMBERS]
            samples.setdefault(part.device, []).append(
                sample.clone(memory_format=torch.contiguous_format).view(torch.uint8)
            )
        return places, {device: torch.cat(parts) for device, parts in samples.items()}
