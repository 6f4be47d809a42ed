"""One row a token, from the record of a pair's tokens: what tables print and pages colour.

Letters: T_w and T_l completion tokens of chosen and rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradent.record import TokenRecord
from gradent.text import visible

__all__ = ["TokenRow", "rank_tokens", "signed", "token_rows"]

_LABEL = 18  # characters of a token in its name


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """What there is to say of one token."""

    side: str  # `chosen` or `rejected`
    position: int  # in its response, counted from 0
    text: str  # the token's text
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
        return f"{self.position} · {visible(self.text, _LABEL)}"


def token_rows(record: TokenRecord) -> list[TokenRow]:
    """Every token of both responses."""
    inner = np.array(record["inner"], dtype=np.float64)
    whole = float(inner.sum())
    rows = []
    for number, side in enumerate(("chosen", "rejected")):
        texts, part = record[side]["tokens"], record[side]  # type: ignore[literal-required]
        shared = {pair[number] for pair in record["alignment"]}
        entangled = inner.sum(1 - number).tolist()
        rows += [
            TokenRow(
                side=side,
                position=place,
                text=text,
                identical=place in shared,
                entanglement=entangled[place],
                share=entangled[place] / whole if whole else None,
                norm=math.sqrt(part["squares"][place]),
                effect=part["effects"][place],
            )
            for place, text in enumerate(texts)
        ]
    return rows


def rank_tokens(rows: Sequence[TokenRow], count: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """The tokens at both ends."""
    ordered = sorted(rows, key=lambda row: row.entanglement)
    entangling = [row for row in reversed(ordered) if row.entanglement > 0]
    return entangling[:count], [row for row in ordered if row.entanglement < 0][:count]


def signed(value: float) -> str:
    """A number with its sign, to three digits; an exponent only where it is very large or very small."""
    if not (value and 1e-3 <= abs(value) < 1e6):
        return f"{value:+.3g}"
    return f"{value:+,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
