"""Inner products between tokens' gradients of one weight, in two exact contractions and in tiles.

Letters: m tokens of a block, M positions of its row, X the width of their output gradients b, Y the width of the
operand a that they share; a token's gradient is `G = Σ_p b_p a_pᵀ`, `[X, Y]`. `sizes` are the numbers of chosen and of
rejected tokens, `(n_w, n_l)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.kernels.common.numerics import RUN, accumulator, spans

__all__ = [
    "Block",
    "Entries",
    "flat_entries",
    "prefix_families",
    "products",
    "rank_one_entries",
    "shared_entries",
    "tied_entries",
]


@dataclass(frozen=True)
class Block:
    """Tokens of one side whose output gradients share an operand."""

    side: int  # 0 for chosen, 1 for rejected
    tokens: Sequence[int]  # their numbers on that side
    b: Tensor  # output gradients [m, M, X]
    a: Tensor  # the shared operand [M, Y], or int64 ids [M], which stand for rows of the identity


class Entries:
    """Inner products of all tokens of chosen with all of rejected, and squares, float64, on the CPU."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        self.inner = torch.zeros(*sizes, dtype=torch.float64)
        self.squares = tuple(torch.zeros(size, dtype=torch.float64) for size in sizes)

    def add_inner(self, chosen: Sequence[int], rejected: Sequence[int], values: Tensor) -> None:
        """Add `[len(chosen), len(rejected)]` values."""
        self.inner[torch.tensor(chosen)[:, None], torch.tensor(rejected)[None]] += values.double().cpu()

    def add_squares(self, side: int, tokens: Sequence[int], values: Tensor) -> None:
        """Add `[len(tokens)]` values."""
        self.squares[side][torch.tensor(tokens)] += values.double().cpu()

    def put(self, block: tuple[slice, slice], inner: Tensor, squares: Sequence[Tensor]) -> None:
        """Set a block: `inner` of its chosen and rejected tokens, and `squares` of each side's."""
        self.inner[block] = inner
        for mine, part, values in zip(self.squares, block, squares, strict=True):
            mine[part] = values

    def __iadd__(self, other: Entries) -> Entries:
        self.inner += other.inner
        for mine, theirs in zip(self.squares, other.squares, strict=True):
            mine += theirs
        return self


def products(left: Tensor, right: Tensor) -> Tensor:
    """`left rightᵀ` of `[m, K]` and `[n, K]`, float64 `[m, n]`, in runs of products as long as float32 bears."""
    gram = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for span in spans(left.shape[1], RUN):
        gram += (left[:, span] @ right[:, span].T).double()
    return gram


def flat_entries(blocks: Sequence[tuple[int, Sequence[int], Tensor]], sizes: tuple[int, int], budget: int) -> Entries:
    """Entries of gradients `(side, tokens, gradients [m, K])`, widened in tiles of `budget` bytes."""
    entries = Entries(sizes)
    if not blocks:
        return entries
    wide = accumulator(blocks[0][2].dtype)
    step = max(1, budget // (wide.itemsize * sum(len(tokens) for _, tokens, _ in blocks)))
    for span in spans(blocks[0][2].shape[1], step):
        _add_tile(entries, [(side, tokens, grads[:, span].to(wide)) for side, tokens, grads in blocks])
    return entries


def _add_tile(entries: Entries, tile: Sequence[tuple[int, Sequence[int], Tensor]]) -> None:
    for side, tokens, grads in tile:
        entries.add_squares(side, tokens, _square(grads))
    for left in tile:
        for right in tile:
            if left[0] == 0 and right[0] == 1:
                entries.add_inner(left[1], right[1], products(left[2], right[2]))


def _square(values: Tensor) -> Tensor:
    """`‖row‖²` of `[m, K]`, float64 `[m]`."""
    total = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    for span in spans(values.shape[1], RUN):
        total += values[:, span].square().sum(1).double()
    return total


def shared_entries(blocks: Sequence[Block], sizes: tuple[int, int], budget: int) -> Entries:
    """Entries of blocks of one weight, at most one a token, by the cheaper of the two ways."""
    entries = Entries(sizes)
    if not blocks:
        return entries
    lookup = blocks[0].a.dtype == torch.int64
    if lookup or _gram_flops(blocks) <= _outer_flops(blocks):
        _gram(blocks, entries, budget)
    else:
        _outer(blocks, entries, budget)
    return entries


def _gram_flops(blocks: Sequence[Block]) -> int:
    total = 0
    for left in blocks:
        m, positions, x = left.b.shape
        total += 2 * positions * positions * (left.a.shape[1] + m * x)
        if left.side == 0:
            for right in blocks:
                if right.side == 1:
                    n, others, _ = right.b.shape
                    total += 2 * positions * (others * (left.a.shape[1] + n * x) + m * n * x)
    return total


def _outer_flops(blocks: Sequence[Block]) -> int:
    size = blocks[0].b.shape[2] * blocks[0].a.shape[1]
    counts = [sum(len(block.tokens) for block in blocks if block.side == side) for side in (0, 1)]
    return 2 * size * (sum(block.b.shape[0] * block.b.shape[1] for block in blocks) + counts[0] * counts[1])


def _kernel(left: Block, right: Block, dtype: torch.dtype) -> Tensor:
    """`a a'ᵀ`, `[M, M']`."""
    if left.a.dtype == torch.int64:
        return (left.a[:, None] == right.a[None]).to(dtype)
    return left.a.to(dtype) @ right.a.to(dtype).T


def _gram(blocks: Sequence[Block], entries: Entries, budget: int) -> None:
    """`⟨G_i, G_j⟩ = ⟨b_i, (a a'ᵀ) b_j⟩`, some columns of b at a time; the `[M, M']` come on top of the budget."""
    wide = accumulator(blocks[0].b.dtype)
    families = prefix_families([block for block in blocks if block.side == 0])
    for right in blocks:
        square = _kernel(right, right, wide)
        others = [(family, _kernel(family[0], right, wide)) for family in families if right.side == 1]
        longest = max([right.b.shape[1], *(kernel.shape[0] for _, kernel in others)])
        most = max(len(block.tokens) * block.b.shape[1] for block in blocks)
        copies = 3 if right.b.dtype == wide else 4
        step = max(1, budget // (wide.itemsize * max(1, copies * len(right.tokens) * longest + most)))
        for span in spans(right.b.shape[2], step):
            _add_columns(entries, right, span, square, others)


def _add_columns(
    entries: Entries, right: Block, span: slice, kernel: Tensor, others: Sequence[tuple[list[Block], Tensor]]
) -> None:
    """What some columns of a block's output gradients add to its squares and to its products with the chosen tokens."""
    wide = kernel.dtype
    columns = right.b[:, :, span].to(wide)
    moved = torch.matmul(kernel, columns)  # [n, M, step]
    entries.add_squares(right.side, right.tokens, (moved * columns).flatten(1).sum(1))
    for family, kernel in others:
        del moved
        moved = torch.matmul(kernel, columns)
        for left in family:
            flat = left.b[:, :, span].to(wide).flatten(1)
            entries.add_inner(left.tokens, right.tokens, products(flat, moved[:, : left.b.shape[1]].flatten(1)))
            del flat


def prefix_families(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks of one side whose operands are prefixes of one another (to rounding), the longest first in each family."""
    families: list[list[Block]] = []
    for block in sorted(blocks, key=lambda block: -block.b.shape[1]):
        home = next((family for family in families if _is_prefix(block.a, family[0].a)), None)
        if home is None:
            families.append([block])
        else:
            home.append(block)
    return families


def _is_prefix(short: Tensor, long: Tensor) -> bool:
    start = long[: len(short)]
    if short.shape != start.shape or short.dtype != start.dtype:
        return False
    if short.dtype == torch.int64:
        return torch.equal(short, start)
    if not short.numel():
        return True
    limit = 64 * torch.finfo(short.dtype).eps * float(long.abs().max())
    return float((short - start).abs().max()) <= limit


def _outer(blocks: Sequence[Block], entries: Entries, budget: int) -> None:
    """`⟨G_i, G_j⟩` from gradients that are formed, tile by tile."""
    wide = accumulator(blocks[0].b.dtype)
    rows, columns = blocks[0].b.shape[2], blocks[0].a.shape[1]
    tokens = sum(len(block.tokens) for block in blocks)
    width = min(columns, max(1, budget // (2 * wide.itemsize * tokens)))
    # Besides a row of the tile and its squares, the row's output gradients at all positions, widened and turned.
    turned = max(block.b.shape[0] * block.b.shape[1] for block in blocks) * (1 if blocks[0].b.dtype == wide else 2)
    height = max(1, min(rows, budget // (wide.itemsize * (2 * width * tokens + turned))))
    for top in spans(rows, height):
        for left in spans(columns, width):
            _add_tile(entries, [(block.side, block.tokens, _formed(block, top, left, wide)) for block in blocks])


def _formed(block: Block, top: slice, left: slice, dtype: torch.dtype) -> Tensor:
    """A tile of every token's gradient, `[m, rows·columns]`."""
    b = block.b[:, :, top].to(dtype)
    return (b.mT.reshape(-1, b.shape[1]) @ block.a[:, left].to(dtype)).view(len(b), -1)


def rank_one_entries(
    blocks: Sequence[tuple[int, Sequence[int], Tensor, Tensor]], sizes: tuple[int, int], budget: int
) -> Entries:
    """Entries `(u_i·u_j)(v_i·v_j)` of gradients `G_i = u_i v_iᵀ`, given as `(side, tokens, u [m, O], v [m, I])`."""
    first = flat_entries([(side, tokens, u) for side, tokens, u, _ in blocks], sizes, budget)
    second = flat_entries([(side, tokens, v) for side, tokens, _, v in blocks], sizes, budget)
    first.inner *= second.inner
    for mine, theirs in zip(first.squares, second.squares, strict=True):
        mine *= theirs
    return first


def tied_entries(
    heads: Sequence[tuple[int, Sequence[int], Tensor, Tensor]],
    lookups: Sequence[Block],
    ids: Tensor,
    sizes: tuple[int, int],
    budget: int,
) -> Entries:
    """What a tied head, u on the rows `ids` alone, and its embedding add to the entries of either: their products."""
    entries = Entries(sizes)
    for side, tokens, u, v in heads:
        wide = accumulator(u.dtype)
        for block in lookups:
            near = u.to(wide)[:, torch.searchsorted(ids, block.a)]  # [m, M]
            step = max(1, budget // (2 * wide.itemsize * max(1, block.b.shape[1] * max(len(tokens), block.b.shape[2]))))
            for span in spans(len(block.tokens), step):
                others = list(block.tokens[span])
                weights = block.b[span].to(wide) @ v.to(wide).T  # [n, M, m]
                values = torch.einsum("npm,mp->mn", weights, near)
                if side != block.side:
                    if side == 0:
                        entries.add_inner(tokens, others, values)
                    else:
                        entries.add_inner(others, tokens, values.T)
                    continue
                place = {token: number for number, token in enumerate(tokens)}
                both = [(place[token], number, token) for number, token in enumerate(others) if token in place]
                if both:
                    mine, theirs, names = zip(*both, strict=True)
                    entries.add_squares(side, names, 2 * values[list(mine), list(theirs)])
    return entries
