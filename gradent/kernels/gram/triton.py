"""`Σ_{t,s} (u_t·x_s)(v_t·y_s)` over tiles of tokens: `⟨G, G'⟩` where a pair is short against the weight.

A tile `[t, s]` of both products lives in registers and is summed there, as in flash attention; only one number a tile
reaches memory. Of a gradient with itself only tiles on and below the diagonal are formed. Accumulation is float32
within a tile and float64 across tiles; addresses are int64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradent.kernels.common.triton_operands import Factors, Spans, blank, current_device
from gradent.kernels.common.triton_tiles import (
    INTERPRETED,
    LOOSE,
    REACH,
    UNITED,
    Config,
    accumulate,
    load_tile,
    pick_gram,
    unit,
)

__all__ = ["gram_entries", "gram_kernel", "gram_scratch"]

PARTIAL = 8
"""Bytes of a tile's sum: float64, or else `sum` would first make a float64 copy of them all."""


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
    """Gram entries of k pairs in one launch, by tokens.

    Costs `2 (T_w²/2 + T_w T_l + T_l²/2)(O + I)` flops a pair, and `gram_scratch` bytes.

    Args:
        u_w: `[N_w, O]`, float32, bfloat16 or float16, any strides.
        v_w: `[N_w, I]`.
        u_l: `[N_l, O]`.
        v_l: `[N_l, I]`.
        spans: where the tokens of each pair lie.
        config: sizes of a tile; None to choose by dtype and sizes.
        poison: fill with nan what the kernel is to write, for a check.

    Returns:
        `[k, 3]` float64 `(‖G_w‖², ‖G_l‖², ⟨G_w, G_l⟩)` on the operands' device, the same bits every time.

    Raises:
        InputError: operands that do not go together, or float64.
    """
    factors = Factors(u_w, v_w, u_l, v_l, spans)
    config = config or _pick(factors)
    pairs, tiles = len(spans), _tiles(spans, config.rows)
    if pairs * tiles == 0:
        return torch.zeros(pairs, 3, dtype=torch.float64, device=factors.device)
    partials = blank(pairs, 3, tiles, dtype=torch.float64, device=factors.device, poison=poison)
    uw_t, uw_o, vw_t, vw_i, ul_t, ul_o, vl_t, vl_i = factors.strides
    unit_o, unit_i = unit(factors.rows, uw_t, ul_t), unit(factors.cols, vw_t, vl_t)
    with current_device(factors.device):
        gram_kernel[(pairs * 3 * tiles,)](
            u_w,
            v_w,
            u_l,
            v_l,
            spans.table(factors.device),
            partials,
            tiles,
            factors.rows // unit_o,
            factors.cols // unit_i,
            uw_t // unit_o,
            uw_o,
            vw_t // unit_i,
            vw_i,
            ul_t // unit_o,
            ul_o,
            vl_t // unit_i,
            vl_i,
            UNIT_O=unit_o,
            UNIT_I=unit_i,
            B=config.rows,
            DEPTH=config.depth,
            WIDE=INTERPRETED,
            FAR=max(factors.strides) >= REACH,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    return partials.sum(2)


def gram_scratch(u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, spans: Spans) -> int:
    """Bytes that `gram_entries` allocates besides its result: three float64 a tile and pair, and a table."""
    factors = Factors(u_w, v_w, u_l, v_l, spans)
    return len(spans) * (3 * PARTIAL * _tiles(spans, _pick(factors).rows) + 4 * 8)


def _pick(factors: Factors) -> Config:
    wide = factors.u_w.dtype if factors.u_w.dtype == torch.float32 else factors.v_w.dtype
    return pick_gram(wide, factors.spans.longest, len(factors.spans))


def _tiles(spans: Spans, side: int) -> int:
    """Tiles of the largest of all blocks; shorter blocks have as many programs, and the rest of them is idle."""
    most = [0]
    for chosen, rejected in set(zip(spans.chosen_length, spans.rejected_length, strict=True)):
        tall, wide = math.ceil(chosen / side), math.ceil(rejected / side)
        most += [tall * (tall + 1) // 2, wide * (wide + 1) // 2, tall * wide]
    return max(most)


@triton.jit(do_not_specialize=LOOSE, do_not_specialize_on_alignment=UNITED)  # type: ignore[untyped-decorator, unused-ignore]
def gram_kernel(
    u_w: tl.tensor,
    v_w: tl.tensor,
    u_l: tl.tensor,
    v_l: tl.tensor,
    spans: tl.tensor,
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
    """`partials[pair, block, tile]` = a tile's part of one of the three sums. Grid: pairs × 3 blocks × tiles."""
    O = O * UNIT_O  # noqa: E741
    I = I * UNIT_I  # noqa: E741
    uw_t = uw_t * UNIT_O
    ul_t = ul_t * UNIT_O
    vw_t = vw_t * UNIT_I
    vl_t = vl_t * UNIT_I
    program = tl.program_id(0).to(tl.int64)
    tile = (program % tiles).to(tl.int32)
    block = (program // tiles) % 3
    spans += program // tiles // 3 * 4
    w_start = tl.load(spans)
    w_length = tl.load(spans + 1).to(tl.int32)
    l_start = tl.load(spans + 2)
    l_length = tl.load(spans + 3).to(tl.int32)
    u_w += w_start * uw_t
    v_w += w_start * vw_t
    u_l += l_start * ul_t
    v_l += l_start * vl_t
    total = 0.0
    # The three calls are inlined: operands chosen at run time would lose what is known of their alignment.
    if block == 0:
        total = own_tile(u_w, v_w, w_length, tile, O, I, uw_t, uw_o, vw_t, vw_i, B, DEPTH, WIDE, FAR)
    elif block == 1:
        total = own_tile(u_l, v_l, l_length, tile, O, I, ul_t, ul_o, vl_t, vl_i, B, DEPTH, WIDE, FAR)
    else:
        across = tl.cdiv(l_length, B)
        if tile < tl.cdiv(w_length, B) * across:
            left = contract(
                u_w,
                u_l,
                tile // across,
                tile % across,
                w_length,
                l_length,
                O,
                uw_t,
                uw_o,
                ul_t,
                ul_o,
                B,
                DEPTH,
                WIDE,
                FAR,
            )
            right = contract(
                v_w,
                v_l,
                tile // across,
                tile % across,
                w_length,
                l_length,
                I,
                vw_t,
                vw_i,
                vl_t,
                vl_i,
                B,
                DEPTH,
                WIDE,
                FAR,
            )
            total = tl.sum(left * right)
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
