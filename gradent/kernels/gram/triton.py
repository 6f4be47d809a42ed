"""`Σ_{t,s} (u_t·x_s)(v_t·y_s)` over tiles of tokens: `⟨G, G'⟩` where rows are short against the weight.

A tile `[t, s]` of both products lives in registers and is summed there, as in flash attention; only one number a tile
reaches memory. Of a gradient with itself only tiles on and below the diagonal are formed. Accumulation is float32
within a tile and float64 across tiles; addresses are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradent.kernels.common.tiles import Config, gram_bytes, gram_tiles, pick_gram
from gradent.kernels.common.triton_operands import Factors, Groups, Spans, blank, current_device, on_device
from gradent.kernels.common.triton_tiles import INTERPRETED, LOOSE, UNITED, accumulate, arguments, load_tile

__all__ = ["gram_entries", "gram_kernel", "gram_products", "gram_scratch"]


def gram_entries(
    u_w: Tensor,
    v_w: Tensor,
    u_l: Tensor,
    v_l: Tensor,
    spans: Spans,
    *,
    config: Config | None = None,
    poison: bool = False,
) -> Tensor:
    """`(‖G_w‖², ‖G_l‖², ⟨G_w, G_l⟩)` of k pairs, `[k, 3]` float64, from u `[N, O]` and v `[N, I]` of each side."""
    return _launch(Factors(u_w, v_w, u_l, v_l, spans), config, poison).view(len(spans), 3)


def gram_products(
    u: Tensor, v: Tensor, groups: Groups, *, config: Config | None = None, poison: bool = False
) -> Tensor:
    """All `⟨G_i, G_j⟩` of each group, squares first, `[groups.count]` float64, from u `[N, O]` and v `[N, I]`."""
    return _launch(Factors(u, v, u, v, groups), config, poison)


def gram_scratch(u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, spans: Spans | Groups) -> int:
    """Bytes that `gram_entries` or `gram_products` allocates besides its result."""
    return gram_bytes(_wide(Factors(u_w, v_w, u_l, v_l, spans)), spans)


def _wide(factors: Factors) -> torch.dtype:
    return factors.u_w.dtype if factors.u_w.dtype == torch.float32 else factors.v_w.dtype


def _launch(factors: Factors, config: Config | None, poison: bool) -> Tensor:
    """A float64 number for each of the spans' products."""
    spans = factors.spans
    config = config or pick_gram(_wide(factors), spans.longest, spans.pairs)
    tiles = gram_tiles(spans, config.rows)
    if spans.count * tiles == 0:
        return torch.zeros(spans.count, dtype=torch.float64, device=factors.device)
    partials = blank(spans.count, tiles, dtype=torch.float64, device=factors.device, poison=poison)
    (*sizes, _, _), constants = arguments(factors, config)
    table = on_device(spans, "products", factors.device)
    with current_device(factors.device):
        gram_kernel[(spans.count * tiles,)](
            *factors.operands, table, partials, tiles, *sizes, B=config.rows, WIDE=INTERPRETED, **constants
        )
    return partials.sum(1)


@triton.jit(do_not_specialize=LOOSE, do_not_specialize_on_alignment=UNITED)  # type: ignore[untyped-decorator, unused-ignore]
def gram_kernel(
    u_w: tl.tensor,
    v_w: tl.tensor,
    u_l: tl.tensor,
    v_l: tl.tensor,
    products: tl.tensor,
    partials: tl.tensor,
    tiles: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.tensor,  # noqa: E741
    uw_t: tl.tensor,
    uw_o: tl.tensor,
    vw_t: tl.tensor,
    vw_i: tl.tensor,
    ul_t: tl.tensor,
    ul_o: tl.tensor,
    vl_t: tl.tensor,
    vl_i: tl.tensor,
    UNIT_O: tl.constexpr,
    UNIT_I: tl.constexpr,
    B: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
) -> None:
    """`partials[product, tile]` = a tile's part of `⟨G, G'⟩`. Grid: products × tiles."""
    O = O * UNIT_O  # noqa: E741
    I = I * UNIT_I  # noqa: E741
    uw_t = uw_t * UNIT_O
    ul_t = ul_t * UNIT_O
    vw_t = vw_t * UNIT_I
    vl_t = vl_t * UNIT_I
    program = tl.program_id(0).to(tl.int64)
    tile = (program % tiles).to(tl.int32)
    products += program // tiles * 5
    kind = tl.load(products)
    left = tl.load(products + 1)
    n = tl.load(products + 2).to(tl.int32)
    right = tl.load(products + 3)
    m = tl.load(products + 4).to(tl.int32)
    u_w += left * uw_t
    v_w += left * vw_t
    u_l += right * ul_t
    v_l += right * vl_t
    total = 0.0
    # The three calls are inlined: operands chosen at run time would lose what is known of their alignment.
    if kind == 0:
        total = own_tile(u_w, v_w, n, tile, O, I, uw_t, uw_o, vw_t, vw_i, B, DEPTH, WIDE, FAR)
    elif kind == 1:
        total = own_tile(u_l, v_l, m, tile, O, I, ul_t, ul_o, vl_t, vl_i, B, DEPTH, WIDE, FAR)
    else:
        across = tl.cdiv(m, B)
        if tile < tl.cdiv(n, B) * across:
            i = tile // across
            j = tile % across
            a = contract(u_w, u_l, i, j, n, m, O, uw_t, uw_o, ul_t, ul_o, B, DEPTH, WIDE, FAR)
            b = contract(v_w, v_l, i, j, n, m, I, vw_t, vw_i, vl_t, vl_i, B, DEPTH, WIDE, FAR)
            total = tl.sum(a * b)
    tl.store(partials + program, total)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def own_tile(
    u: tl.tensor,
    v: tl.tensor,
    length: tl.tensor,
    tile: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.tensor,  # noqa: E741
    u_t: tl.tensor,
    u_o: tl.tensor,
    v_t: tl.tensor,
    v_i: tl.tensor,
    B: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
) -> tl.tensor:
    """A tile of a gradient with itself, counted for its mirror image too; 0 beyond the last one."""
    count = tl.cdiv(length, B)
    # Rows r and count-1-r of a triangle make up a rectangle (of an odd count, r-1 and count-1-r).
    odd = count % 2
    across = count + 1 - odd
    total = 0.0
    if tile < count * (count + 1) // 2:
        fold = tile // across
        place = tile % across
        split = fold + 1 - odd
        i = tl.where(place < split, split - 1, count - 1 - fold)
        j = tl.where(place < split, place, place - split)
        left = contract(u, u, i, j, length, length, O, u_t, u_o, u_t, u_o, B, DEPTH, WIDE, FAR)
        right = contract(v, v, i, j, length, length, I, v_t, v_i, v_t, v_i, B, DEPTH, WIDE, FAR)
        total = tl.sum(left * right) * tl.where(i == j, 1.0, 2.0)
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def contract(
    a: tl.tensor,
    b: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    a_length: tl.tensor,
    b_length: tl.tensor,
    width: tl.tensor,
    a_t: tl.tensor,
    a_k: tl.tensor,
    b_t: tl.tensor,
    b_k: tl.tensor,
    B: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
) -> tl.tensor:
    """Tile `[i, j]` of `a bᵀ`, float32 `[B, B]`."""
    total = tl.zeros((B, B), dtype=tl.float32)
    for start in range(0, width, DEPTH):
        left = load_tile(a, i * B, a_length, start, width, a_t, a_k, B, DEPTH, FAR)
        right = load_tile(b, j * B, b_length, start, width, b_t, b_k, B, DEPTH, FAR)
        total = accumulate(total, left, tl.trans(right), WIDE)
    return total
