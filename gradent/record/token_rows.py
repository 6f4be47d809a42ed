"""One row a token, from the record of a pair's tokens: what tables print and pages colour.

Letters: T_w and T_l completion tokens of chosen and rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gradent.record.documents import TokenRecord
from gradent.text import visible

__all__ = ["TokenRow", "list_tokens", "name_token", "rank_ends"]

_LABEL = 18  # characters of a token in its name
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """What there is to say of one token."""

    side: str  # `chosen` or `rejected`
    position: int  # in its response, counted from 0
    text: str
    identical: bool  # whether the other response has it too, by the alignment of the two
    entanglement: float  # `⟨∇log π(token), g⟩`, g the gradient of the other response
    share: float | None  # of the pair's inner product; None where that is zero
    norm: float  # `‖∇log π(token)‖`
    effect: float  # first-order change of its log-prob per unit of a margin step

    @property
    def kind(self) -> str:
        """`identical` or `differing`."""
        return "identical" if self.identical else "differing"

    @property
    def name(self) -> str:
        """Position and text, as on the axes of the heat map."""
        return name_token(self.position, self.text)


def name_token(position: int, text: str) -> str:
    """A token in a line of text: its position and how it reads."""
    return f"{position} · {visible(text, _LABEL)}"


def list_tokens(record: TokenRecord) -> list[TokenRow]:
    """The T_w chosen tokens of a pair, then its T_l rejected ones."""
    inner = np.array(record["inner"], dtype=np.float64)
    total = float(inner.sum())
    rows = []
    for number, side in enumerate(("chosen", "rejected")):
        response = record[side]  # type: ignore[literal-required]
        shared = {pair[number] for pair in record["alignment"]}
        entanglements = inner.sum(1 - number).tolist()
        columns = response["tokens"], response["squares"], response["effects"], entanglements
        rows += [
            TokenRow(
                side=side, position=position, text=text, identical=position in shared, entanglement=entanglement,
                share=entanglement / total if total else None, norm=math.sqrt(square), effect=effect,
            )
            for position, (text, square, effect, entanglement) in enumerate(zip(*columns, strict=True))
        ]  # fmt: skip
    return rows


def rank_ends(rows: Sequence[Row], value: Callable[[Row], float], count: int) -> tuple[list[Row], list[Row]]:
    """The rows with the largest positive values and those with the most negative ones, at most `count` of each."""
    ordered = sorted(rows, key=value)
    highest = [row for row in reversed(ordered) if value(row) > 0]
    return highest[:count], [row for row in ordered if value(row) < 0][:count]
