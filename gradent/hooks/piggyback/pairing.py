"""Which rows of a trainer's batch are chosen and which rejected, and which belong together."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

__all__ = ["Pairing", "pair_rows"]

Pairing = Literal["halves", "thirds", "either", "signs"]
"""`halves`: all chosen rows, then all rejected rows (DPO, CPO, ORPO, reward models). `thirds`: a third block follows
that belongs to no pair (TPO). `either`: halves, where either row of a pair may be the chosen one; it is the one that
the loss wants up more (OnlineDPO, where a reward decides). `signs`: rows in any order, chosen where the loss wants the
log-prob up, rejected where it wants it down, the first chosen beside the first rejected and so on (KTO, whose rows are
no pairs)."""


def pair_rows(pairing: Pairing, c: Tensor) -> list[int] | str:
    """Row numbers of 2k paired rows, chosen first, from `c = ∂L/∂log π(y|x)` `[N]`; or why they do not pair up."""
    rows = len(c)
    if pairing == "signs":
        chosen, rejected = ([row for row in range(rows) if sign * float(c[row]) < 0] for sign in (1, -1))
        pairs = min(len(chosen), len(rejected))
        return chosen[:pairs] + rejected[:pairs]
    blocks = 3 if pairing == "thirds" else 2
    if rows % blocks:
        return f"the forward has {rows} rows, which are not {blocks} blocks of one size"
    pairs = rows // blocks
    if pairing == "either":
        is_swapped = [float(c[pair]) > float(c[pairs + pair]) for pair in range(pairs)]
        chosen = [pair + pairs * swap for pair, swap in enumerate(is_swapped)]
        return chosen + [pair + pairs * (not swap) for pair, swap in enumerate(is_swapped)]
    return list(range(2 * pairs))
