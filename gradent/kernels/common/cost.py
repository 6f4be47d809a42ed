"""What the two contractions of a group of rows cost, and in which tiles they fit a budget.

Letters: n rows of T_i tokens, D directions, O and I the two sides of a weight `[O, I]`. A row's gradient is
`G_i = Σ_t u_t v_tᵀ` with `u [T_i, O]`, `v [T_i, I]`. Two forms give all products among the rows:

- **gram** `Σ_{t,s} (u_t·u_s)(v_t·v_s)`: `2 (O + I) Σ_{i≤j} T_i T_j` flops in tiles of `[t, s]`; in tiles smaller than a
  row, those above the diagonal of a row with itself are not formed. A direction takes `2 T_i O I` more of every row;
- **outer** tiles of `uᵀv`, multiplied by each other: `2 O I (Σ_i T_i + n (n + D))` flops in tiles of `[o, i]`.

Of pairs with equal rows, gram is the cheaper one for about `T < ⅔h`, `h = O I / (O + I)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gradent.errors import MemoryBudgetError
from gradent.kernels.common.budget import tile_room

__all__ = ["DEPTH", "GRAM_COST", "Tiling", "batch_scratch", "can_wait", "cheapest"]

DEPTH = 128
"""Length of the contracted axis that is widened at once: long enough for a matrix product to run at speed."""

GRAM_COST = {"torch": 1.0, "triton": 1.0}
"""What a gram flop costs in outer flops on a path: committed, and 1 until a device's measurements say otherwise."""

PLAIN = 2.0**16
"""Factors of a gradient from 1/PLAIN to PLAIN can wait until its products are formed: squares of what is not yet
multiplied are off by 2^±32 at most, which leaves float32 (2^±126) room enough. float16 is widened first."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How one layer of one group is reduced."""

    form: Literal["gram", "outer"]
    tile: tuple[int, int]  # tokens by tokens for gram, rows by columns of the weight for outer
    depth: int  # length of the contracted axis taken at once: all of it, or `DEPTH` where operands are widened
    flops: int  # multiply-adds counted twice, of the matrix products alone, those that are really formed
    scratch: int  # bytes held at once: tiles, and operands once more where they are widened; sums come on top


def can_wait(factor: float) -> bool:
    """Whether a gradient's factor can be left to its products (`PLAIN`)."""
    return 1 / PLAIN <= abs(factor) <= PLAIN


def cheapest(
    lengths: Sequence[int],
    out: int,
    inp: int,
    *,
    itemsize: int,
    budget: int,
    widen: bool = False,
    weighted: bool = False,
    directions: int = 0,
    gram_cost: float = 1.0,
) -> Tiling:
    """The cheaper form for rows of T_i tokens and a weight `[O, I]`, in tiles that fit `budget` bytes.

    `itemsize` is that of an accumulating element, `widen` says that operands are narrower and `weighted` that a
    preconditioner multiplies the entries, which only `outer` can do.
    """
    longest, count, sides = max(*lengths, 1), len(lengths), (out, inp)
    outer_flops = 2 * out * inp * (sum(lengths) + count * (count + directions))
    if not weighted:
        tile, depth, scratch = _fit((longest, longest), max(sides), 2, itemsize, budget, widen, sides, count)
        blocks = sum(_triangle(length, tile) for length in lengths)
        blocks += (sum(lengths) ** 2 - sum(length**2 for length in lengths)) // 2
        gram_flops = 2 * (out + inp) * blocks + 2 * directions * sum(lengths) * out * inp
        if gram_flops * gram_cost < outer_flops:
            return Tiling(form="gram", tile=tile, depth=depth, flops=gram_flops, scratch=scratch)
    tiles = count + directions + weighted
    tile, depth, scratch = _fit(sides, longest, tiles, itemsize, budget, widen, sides, count)
    return Tiling(form="outer", tile=tile, depth=depth, flops=outer_flops, scratch=scratch)


def _fit(
    tile: tuple[int, int],
    depth: int,
    products: int,
    itemsize: int,
    budget: int,
    widen: bool,
    shape: tuple[int, int],
    rows: int,
) -> tuple[tuple[int, int], int, int]:
    """`(tile, depth, scratch)`: the longer side is halved until the tile fits, then the depth, down to single ones."""
    if widen:
        depth = min(depth, DEPTH)
    while (scratch := itemsize * (products * tile[0] * tile[1] + widen * depth * sum(tile))) > tile_room(budget):
        if tile != (1, 1):
            tile = (-(-tile[0] // 2), tile[1]) if tile[0] >= tile[1] else (tile[0], -(-tile[1] // 2))
        elif widen and depth > 1:
            depth //= 2
        else:
            raise MemoryBudgetError(
                f"memory_budget is {budget} bytes, but the smallest tile of the gradients of {rows} rows of a "
                f"[{shape[0]}, {shape[1]}] weight needs {scratch} bytes. Give at least that much."
            )
    return tile, depth, scratch


def _triangle(tokens: int, tile: tuple[int, int]) -> int:
    """Entries of a block of a row with itself that are formed: square tiles above the diagonal are not."""
    if tile[0] != tile[1]:
        return tokens * tokens
    whole, rest = divmod(tokens, tile[0])
    return (tokens * tokens + whole * tile[0] ** 2 + rest**2) // 2


def batch_scratch(
    count: int, length: int, out: int, inp: int, *, itemsize: int, widen: tuple[bool, bool] = (False, False)
) -> int:
    """Bytes of the gradients of `count` rows at once: twice, since a copy puts them together, and widened u, v."""
    return count * itemsize * (2 * out * inp + length * (out * widen[0] + inp * widen[1]))
