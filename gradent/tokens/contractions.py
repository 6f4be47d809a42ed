"""Inner products between tokens' gradients of one weight, in two exact contractions and in tiles.

Letters: m tokens of a block, M positions of its row, X the width of their output gradients b, Y the width of the
operand a that they share; a token's gradient is `G = Σ_p b_p a_pᵀ`, `[X, Y]`. `sizes` are the numbers of chosen and of
rejected tokens, `(n_w, n_l)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradent.kernels.common.numerics import RUN, accumulator, dots, spans

__all__ = [
    "Gradients",
    "RankOne",
    "SharedFactor",
    "TokenEntries",
    "gradient_entries",
    "prefix_families",
    "rank_one_entries",
    "shared_entries",
    "tied_entries",
]


@dataclass(frozen=True)
class SharedFactor:
    """Tokens of one side whose output gradients meet one operand: `G_i = Σ_p b_{i,p} a_pᵀ`, or its transpose."""

    side: int  # 0 for chosen, 1 for rejected
    tokens: Sequence[int]  # their numbers on that side
    b: Tensor  # output gradients [m, M, X]
    a: Tensor  # the shared operand [M, Y], or int64 ids [M], which stand for rows of the identity
    b_on_rows: bool = True  # whether X are the weight's rows; of ids, no

    @property
    def is_lookup(self) -> bool:
        """Whether the shared operand is a list of ids."""
        return self.a.dtype == torch.int64


@dataclass(frozen=True)
class RankOne:
    """`G_i = u_i v_iᵀ`, u `[m, O]`, v `[m, I]`: a use that each token reaches at its own position alone."""

    side: int
    tokens: Sequence[int]
    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class Gradients:
    """The gradients themselves, `[m, ...]`."""

    side: int
    tokens: Sequence[int]
    grads: Tensor


class TokenEntries:
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
        for target, part, values in zip(self.squares, block, squares, strict=True):
            target[part] = values

    def __iadd__(self, other: TokenEntries) -> TokenEntries:
        self.inner += other.inner
        for squares, added in zip(self.squares, other.squares, strict=True):
            squares += added
        return self


def gradient_entries(parts: Sequence[Gradients], sizes: tuple[int, int], budget: int) -> TokenEntries:
    """Entries of the gradients themselves, widened in tiles of `budget` bytes."""
    entries = TokenEntries(sizes)
    if not parts:
        return entries
    wide = accumulator(parts[0].grads.dtype)
    step = max(1, budget // (wide.itemsize * sum(len(part.tokens) for part in parts)))
    flat = [replace(part, grads=part.grads.reshape(len(part.grads), -1)) for part in parts]
    for span in spans(flat[0].grads.shape[1], step):
        _add_tile(entries, [replace(part, grads=part.grads[:, span].to(wide)) for part in flat])
    return entries


def _add_tile(entries: TokenEntries, tile: Sequence[Gradients]) -> None:
    for part in tile:
        entries.add_squares(part.side, part.tokens, _square(part.grads))
    for left in tile:
        for right in tile:
            if left.side == 0 and right.side == 1:
                entries.add_inner(left.tokens, right.tokens, dots(left.grads, right.grads))


def _square(values: Tensor) -> Tensor:
    """Squared norms of the rows of `[m, K]`, float64 `[m]`."""
    total = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    for span in spans(values.shape[1], RUN):
        total += values[:, span].square().sum(1).double()
    return total


def shared_entries(blocks: Sequence[SharedFactor], sizes: tuple[int, int], budget: int) -> TokenEntries:
    """Entries of blocks of one weight, at most one a token, by the cheaper of Gram and outer form."""
    entries = TokenEntries(sizes)
    if not blocks:
        return entries
    if blocks[0].is_lookup or _gram_flops(blocks) <= _outer_flops(blocks):
        _gram(blocks, entries, budget)
    else:
        _outer(blocks, entries, budget)
    return entries


def _gram_flops(blocks: Sequence[SharedFactor]) -> int:
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


def _outer_flops(blocks: Sequence[SharedFactor]) -> int:
    size = blocks[0].b.shape[2] * blocks[0].a.shape[1]
    counts = [sum(len(block.tokens) for block in blocks if block.side == side) for side in (0, 1)]
    return 2 * size * (sum(block.b.shape[0] * block.b.shape[1] for block in blocks) + counts[0] * counts[1])


def _kernel(left: SharedFactor, right: SharedFactor, dtype: torch.dtype) -> Tensor:
    """`a a'ᵀ`, `[M, M']`."""
    if left.is_lookup:
        return (left.a[:, None] == right.a[None]).to(dtype)
    return left.a.to(dtype) @ right.a.to(dtype).T


def _gram(blocks: Sequence[SharedFactor], entries: TokenEntries, budget: int) -> None:
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
    entries: TokenEntries,
    right: SharedFactor,
    span: slice,
    kernel: Tensor,
    others: Sequence[tuple[list[SharedFactor], Tensor]],
) -> None:
    """Add the share of some columns of b to a block's squares and to its products with the chosen tokens."""
    wide = kernel.dtype
    columns = right.b[:, :, span].to(wide)
    moved = torch.matmul(kernel, columns)  # [n, M, step]
    entries.add_squares(right.side, right.tokens, (moved * columns).flatten(1).sum(1))
    for family, kernel in others:
        del moved
        moved = torch.matmul(kernel, columns)
        for left in family:
            flat = left.b[:, :, span].to(wide).flatten(1)
            entries.add_inner(left.tokens, right.tokens, dots(flat, moved[:, : left.b.shape[1]].flatten(1)))
            del flat


def prefix_families(blocks: Sequence[SharedFactor]) -> list[list[SharedFactor]]:
    """Blocks of one side grouped by operand: the longest first, the others' operands its prefixes up to rounding."""
    families: list[list[SharedFactor]] = []
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
    if short.dtype == torch.int64 or not short.numel():
        return torch.equal(short, start)
    limit = 64 * torch.finfo(short.dtype).eps * float(long.abs().max())
    return float((short - start).abs().max()) <= limit


def _outer(blocks: Sequence[SharedFactor], entries: TokenEntries, budget: int) -> None:
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
            _add_tile(entries, [_form(block, top, left, wide) for block in blocks])


def _form(block: SharedFactor, top: slice, left: slice, dtype: torch.dtype) -> Gradients:
    """A tile of every token's gradient, `[m, rows·columns]`."""
    b = block.b[:, :, top].to(dtype)
    grads = (b.mT.reshape(-1, b.shape[1]) @ block.a[:, left].to(dtype)).view(len(b), -1)
    return Gradients(block.side, block.tokens, grads)


def rank_one_entries(parts: Sequence[RankOne], sizes: tuple[int, int], budget: int) -> TokenEntries:
    """Entries `(u_i·u_j)(v_i·v_j)` of gradients of rank one, widened in tiles of `budget` bytes."""
    entries = gradient_entries([Gradients(part.side, part.tokens, part.u) for part in parts], sizes, budget)
    others = gradient_entries([Gradients(part.side, part.tokens, part.v) for part in parts], sizes, budget)
    entries.inner *= others.inner
    for squares, factors in zip(entries.squares, others.squares, strict=True):
        squares *= factors
    return entries


def tied_entries(
    heads: Sequence[RankOne], lookups: Sequence[SharedFactor], ids: Tensor, sizes: tuple[int, int], budget: int
) -> TokenEntries:
    """Cross terms of a tied head, u on the rows `ids` alone, and its embedding: to be added to the entries of both."""
    entries = TokenEntries(sizes)
    for head in heads:
        side, tokens, u, v = head.side, head.tokens, head.u, head.v
        wide = accumulator(u.dtype)
        for block in lookups:
            rows = u.to(wide)[:, torch.searchsorted(ids, block.a)]  # [m, M]
            step = max(1, budget // (2 * wide.itemsize * max(1, block.b.shape[1] * max(len(tokens), block.b.shape[2]))))
            for span in spans(len(block.tokens), step):
                looked_up = list(block.tokens[span])
                weights = block.b[span].to(wide) @ v.to(wide).T  # [n, M, m]
                values = torch.einsum("npm,mp->mn", weights, rows)
                if side != block.side:
                    if side == 0:
                        entries.add_inner(tokens, looked_up, values)
                    else:
                        entries.add_inner(looked_up, tokens, values.T)
                    continue
                place = {token: number for number, token in enumerate(tokens)}
                shared = [(place[token], number, token) for number, token in enumerate(looked_up) if token in place]
                if shared:
                    rows_at, columns_at, names = zip(*shared, strict=True)
                    entries.add_squares(side, names, 2 * values[list(rows_at), list(columns_at)])
    return entries
