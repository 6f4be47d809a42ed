"""The unit of what a step of plain gradient descent does to a log-prob."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradent.errors import InputError
from gradent.report.page.numbers import signed_number

__all__ = ["StepUnit", "check_lr"]


@dataclass(frozen=True)
class StepUnit:
    """Nats at a learning rate, or for a unit of it, where none was given."""

    lr: float | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any], lr: float | None = None) -> StepUnit:
        """That of a learning rate that is asked for now, else of the one in a record's settings."""
        return cls(settings.get("lr") if lr is None else lr)

    def __str__(self) -> str:
        return "nats per unit of learning rate" if self.lr is None else f"nats at a learning rate of {self.lr:g}"

    def scale(self, change: float | None) -> float:
        """A change for a unit of learning rate, in this unit; nan stays nan."""
        return math.nan if change is None else change * (1.0 if self.lr is None else self.lr)

    def show(self, change: float | None) -> str:
        """The same as text, with its sign."""
        return signed_number(self.scale(change))


def check_lr(lr: float | None) -> None:
    """Refuse what is no learning rate."""
    if lr is not None and not (isinstance(lr, (int, float)) and math.isfinite(lr) and lr > 0):
        raise InputError(f"lr is {lr!r}; accepted is a number above 0, such as 5e-7 (command line: --lr 5e-7).")
