"""The rungs of the ladder from cheap to exact: what of a scanned pair stands in for its harm, and which way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gradent.record.table import Floats, Table

__all__ = ["RUNGS", "TARGETS", "Rung", "find_rung"]


@dataclass(frozen=True)
class Rung:
    """A score of a pair.

    Attributes:
        name: what `gradent select --by` calls it.
        label: it in words.
        read: the score, from the columns of `scan.parquet`.
        worse: +1 where a pair is the worse the larger it is, -1 the smaller.
        parts: of the scan's costs, those that it takes; empty where the trainer has it anyway.
    """

    name: str
    label: str
    read: Callable[[Table], Floats]
    worse: int
    parts: tuple[str, ...]

    def harm(self, table: Table) -> Floats | None:
        """The score turned so that more is worse, `[P]`; None where it is nowhere known."""
        values = np.asarray(self.worse * self.read(table), dtype=np.float64)
        return values if np.isfinite(values).any() else None

    def cost(self, costs: Mapping[str, float | None]) -> float | None:
        """Seconds a pair; None where a part was not timed."""
        taken = [costs.get(part) for part in self.parts]
        return None if None in taken else float(sum(part or 0.0 for part in taken))


def _column(name: str) -> Callable[[Table], Floats]:
    return lambda table: np.asarray(table[name], dtype=np.float64)


def _of_longer(table: Table) -> Floats:
    return np.asarray(table["edit_distance"] / np.maximum(table["chosen_len"], table["rejected_len"]))


def _shared(table: Table) -> Floats:
    shorter = np.minimum(table["chosen_len"], table["rejected_len"])
    return np.asarray((table["shared_prefix"] + table["shared_suffix"]) / shorter)


def _margin(table: Table) -> Floats:
    return np.asarray(table["chosen_logp"] / table["chosen_len"] - table["rejected_logp"] / table["rejected_len"])


_FORWARD = ("forward",)

TARGETS: dict[str, Rung] = {
    "cosine": Rung("exact", "exact cosine", _column("cosine"), 1, ("exact",)),
    "pair_change": Rung(
        "predicted_change", "chosen's change in a step on the pair", _column("chosen_change"), -1, ("exact",)
    ),
    "sample_change": Rung(
        "sample_change", "chosen's change in a step on the sample", _column("chosen_sample_change"), -1, ("sample",)
    ),
}
"""What the rungs stand in for, by the key that `scan.json` has it under."""

RUNGS: tuple[Rung, ...] = (
    Rung("edit_distance", "edit distance, as a share of the longer response", _of_longer, -1, ("text",)),
    Rung("shared_ends", "shared beginning and end, as a share of the shorter response", _shared, 1, ("text",)),
    Rung("chosen_len", "tokens of chosen", _column("chosen_len"), 1, ("text",)),
    Rung("chosen_logp", "log-prob of chosen", _column("chosen_logp"), 1, _FORWARD),
    Rung("margin", "log-prob a token, chosen less rejected", _margin, -1, _FORWARD),
    Rung(
        "reward_margin", "implicit reward, chosen less rejected", _column("reward_margin"), -1, (*_FORWARD, "reference")
    ),
    Rung("ches", "CHES", _column("ches"), 1, (*_FORWARD, "ches")),
    Rung("ches_normalized", "CHES, length-normalised", _column("ches_normalized"), 1, (*_FORWARD, "ches")),
    Rung("head", "cosine of the head's block", _column("head_cosine"), 1, (*_FORWARD, "head")),
    Rung("head_change", "chosen's change by the head's block", _column("head_change"), -1, (*_FORWARD, "head")),
    *TARGETS.values(),
)
"""From cheap to exact. `worse` of those that are no measure of harm by themselves is how the literature has them:
responses that are alike, chosen that is likely already, and pairs that the model ranks the other way."""


def find_rung(name: str) -> Rung | None:
    """A rung by its name."""
    return next((rung for rung in RUNGS if rung.name == name), None)
