"""Ranks that measure shares of one audit must measure the same thing: what each would measure is compared first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradent.distributed import Ranks
from gradent.errors import InputError
from gradent.loading.preferences import AuditPair
from gradent.record.json_lines import digest

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a number in the journal depends on, but for the files of models, which entries are filed under."""

    versions: Sequence[str]  # of gradent and torch
    measuring: Sequence[Any]  # options of the measuring
    device: str  # kind of device
    is_in_place: bool  # whether the reference is the measured model itself
    pairs: Sequence[AuditPair]

    @property
    def key(self) -> str:
        """What a journal of such an audit is known by."""
        pairs = [[pair.row, *pair.ids] for pair in self.pairs]
        return digest([self.versions, self.measuring, self.device, self.is_in_place, pairs])

    def agree(self, ranks: Ranks) -> None:
        """Refuse ranks that differ in any of this: each would write a journal that the first does not read."""
        said = ranks.gather([self.told()])
        for number, other in enumerate(said):
            if other != said[0]:
                raise InputError(
                    f"The ranks of this audit would measure different things: {_difference(said[0], other, number)}. "
                    "Nothing was measured. Start all ranks with the same packages, data and kind of device, and "
                    "with the same command."
                )

    def told(self) -> dict[str, Any]:
        """Each part by its name, as ranks compare it."""
        return {
            "versions of gradent and torch": list(self.versions), "options of measuring": list(self.measuring),
            "kind of device": self.device, "reference in place": self.is_in_place,
            "rows of the data": [pair.row for pair in self.pairs],
            "token ids": {pair.where: digest(list(pair.ids)) for pair in self.pairs},
        }  # fmt: skip


def _difference(first: Mapping[str, Any], other: Mapping[str, Any], number: int) -> str:
    """The first part in which a rank differs from rank 0, with both values."""
    name = next(name for name in first if first[name] != other[name])
    if name == "rows of the data":
        return f"rank 0 drew {len(first[name])} rows of the data and rank {number} other ones ({len(other[name])})"
    if name == "token ids":
        odd = [where for where, ids in first[name].items() if other[name].get(where) != ids]
        return (
            f"{len(odd)} of {len(first[name])} pairs have other token ids on rank {number} than on rank 0, "
            f"{odd[0]} the first (does the chat template print the time?)"
        )
    return f"{name} {first[name]!r} on rank 0 and {other[name]!r} on rank {number}"
