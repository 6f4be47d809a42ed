"""Which contraction a reduction takes, and in which chunks: decided for every layer and pair, from real lengths.

Letters: T tokens (T_w chosen, T_l rejected), O and I the two sides of a weight `[O, I]`. A gradient is
`G = Σ_t u_t v_tᵀ` with `u [T, O]`, `v [T, I]`. Two forms give `‖G_w‖²`, `‖G_l‖²`, `⟨G_w, G_l⟩`:

- **gram** `Σ_{t,s} (u_t·u_s)(v_t·v_s)`: `2 (T_w² + T_w T_l + T_l²)(O + I)` flops, tiles of `[t, s]`; in tiles smaller
  than a block, those above the diagonal of the two square blocks are not formed: down to ⅔ of the flops;
- **outer** tiles of `uᵀv`, squared and summed: `2 (T_w + T_l) O I` flops, tiles of `[o, i]`.

With T = T_w = T_l, one tile, and flops that cost the same, gram is the cheaper one for `T < ⅔h`, `h = O I / (O + I)`.
How much dearer one kind of flop is than the other on a device, `gradent.kernels.crossover` measures.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gradent.errors import MemoryBudgetError

__all__ = [
    "DEFAULT_BUDGET",
    "LEAST_PRICE",
    "MOST_PRICE",
    "Plan",
    "batch_scratch",
    "can_wait",
    "choose",
    "parse_budget",
    "tile_room",
]

DEFAULT_BUDGET = 256 * 2**20
"""Scratch of the reductions, in bytes, where the user sets none: a few tiles that stay near the caches."""

DEPTH = 128
"""Length of the contracted axis that is widened at once: long enough for a matrix product to run at speed."""

LEAST_PRICE, MOST_PRICE = 0.25, 4.0
"""Bounds of what a gram flop costs in outer flops: beyond a factor of 4 in flops, the price decides nothing."""

SUMS = 2**18
"""Bytes that the sums of a tile take at most: three numbers for each of its runs, or two for each of its rows."""

WORTH = 2**26
"""Flops of the cheaper form, about a millisecond of one CPU core, below which the price is not asked for."""

PLAIN = 2.0**16
"""Factors of a gradient from 1/PLAIN to PLAIN can wait until its products are formed: squares of what is not yet
multiplied are off by 2^±32 at most, which leaves float32 (2^±126) room enough. float16 is widened first."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one layer of one pair is reduced.

    Attributes:
        form: the contraction.
        tile: rows and columns of a tile: tokens by tokens for `gram`, rows by columns of the weight for `outer`.
        depth: length of the contracted axis taken at once: all of it, or `DEPTH` where operands are widened.
        flops: multiply-adds counted twice, of the matrix products alone, those that are really formed.
        scratch: bytes held at once: the tile's products, and its operands once more where they must be widened. What
            sums of tiles take comes on top (`tile_room`).
    """

    form: Literal["gram", "outer"]
    tile: tuple[int, int]
    depth: int
    flops: int
    scratch: int


def can_wait(factor: float) -> bool:
    """Whether a gradient's factor can be left to its products (`PLAIN`)."""
    return 1 / PLAIN <= abs(factor) <= PLAIN


def choose(
    t_w: int,
    t_l: int,
    rows: int,
    cols: int,
    *,
    itemsize: int,
    budget: int,
    widen: bool = False,
    weighted: bool = False,
    price: float | Callable[[], float] = 1.0,
) -> Plan:
    """The cheaper form for one layer and pair, in tiles that fit the budget.

    Args:
        t_w: tokens of the chosen row, T_w.
        t_l: tokens of the rejected row, T_l.
        rows: O, the rows of the weight.
        cols: I, its columns.
        itemsize: bytes of an accumulating element (4 or 8).
        budget: bytes that the tiles may take.
        widen: the operands are narrower than the accumulator, so that a tile's operands are copied.
        weighted: a preconditioner multiplies the entries, which only `outer` can do.
        price: of a gram flop, in outer flops; a function is called only where the choice hangs on what it returns (a
            number from 1/4 to 4), and where there is something to gain.

    Returns:
        The plan; never more scratch than `tile_room(budget)`.

    Raises:
        MemoryBudgetError: not even a tile of one entry fits.
    """
    longest = max(t_w, t_l, 1)
    outer_flops = 2 * (t_w + t_l) * rows * cols
    if not weighted:
        tile, depth, scratch = _fit((longest, longest), max(rows, cols), 2, itemsize, budget, widen, (rows, cols))
        gram_flops = 2 * (rows + cols) * (_triangle(t_w, tile) + t_w * t_l + _triangle(t_l, tile))
        if gram_flops * _dearer(price, gram_flops, outer_flops) < outer_flops:
            return Plan(form="gram", tile=tile, depth=depth, flops=gram_flops, scratch=scratch)
    tile, depth, scratch = _fit((rows, cols), longest, 2 + weighted, itemsize, budget, widen, (rows, cols))
    return Plan(form="outer", tile=tile, depth=depth, flops=outer_flops, scratch=scratch)


def tile_room(budget: int) -> int:
    """Bytes of a budget that tiles may take: a 64th of it, 256 KiB at most, is left to their sums.

    Args:
        budget: bytes.

    Returns:
        Bytes.
    """
    return budget - min(SUMS, budget // 64)


def _fit(
    tile: tuple[int, int], depth: int, products: int, itemsize: int, budget: int, widen: bool, shape: tuple[int, int]
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
                f"memory_budget is {budget} bytes, but the smallest tile of a [{shape[0]}, {shape[1]}] weight's two "
                f"gradients needs {scratch} bytes. Give at least that much."
            )
    return tile, depth, scratch


def _triangle(tokens: int, tile: tuple[int, int]) -> int:
    """Entries of a block of a side with itself that are formed: square tiles above the diagonal are not."""
    if tile[0] != tile[1]:
        return tokens * tokens
    whole, rest = divmod(tokens, tile[0])
    return (tokens * tokens + whole * tile[0] ** 2 + rest**2) // 2


def _dearer(price: float | Callable[[], float], gram_flops: int, outer_flops: int) -> float:
    if not callable(price):
        return price
    low, high = sorted((gram_flops, outer_flops))
    return price() if low >= WORTH and high <= MOST_PRICE * low else 1.0


def batch_scratch(
    count: int, length: int, rows: int, cols: int, *, itemsize: int, widen: tuple[bool, bool] = (False, False)
) -> int:
    """Bytes of the outer form of several rows at once.

    Args:
        count: rows, two a pair.
        length: T, their padded tokens.
        rows: O, the rows of the weight.
        cols: I, its columns.
        itemsize: bytes of an accumulating element.
        widen: whether u and v are narrower than the accumulator.

    Returns:
        The products, twice since they are paired by a copy, and operands that must be widened.
    """
    return count * itemsize * (2 * rows * cols + length * (rows * widen[0] + cols * widen[1]))


def parse_budget(value: int | str | None) -> int | None:
    """A user's `memory_budget` in bytes.

    Args:
        value: bytes as an int, a string such as `"512MiB"`, `"2 GB"` or `"65536"`, or None.

    Returns:
        Bytes, or None for None.

    Raises:
        MemoryBudgetError: not a positive size.

    Example:
        >>> parse_budget("512MiB")
        536870912
    """
    if value is None:
        return None
    size: float | None = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", value, re.IGNORECASE)
        if match and match[2].lower() in _UNITS:
            size = float(match[1]) * _UNITS[match[2].lower()]
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size is None or size < 1:
        raise MemoryBudgetError(
            f"memory_budget={value!r} is not a size. Accepted: a positive number of bytes, or a string such as "
            "'512MiB', '2GiB', '800MB'; None for the default."
        )
    return int(size)
