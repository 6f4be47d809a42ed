"""`G = Σ_t u_t v_tᵀ` in tiles of the weight: squared and summed in registers, and stored only where it is wanted.

A program forms the same tile of `G_w` and `G_l` side by side, multiplies it by the metric's root if there is one, and
writes three sums. With `STORE` it goes through all pairs and also adds up `c_w G_w + c_l G_l`, which is what
the trainer's own backward computes. Accumulation is float32 within a tile and float64 across tiles; addresses are
int64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradent.errors import InputError
from gradent.kernels.common.streams import sent
from gradent.kernels.common.triton_operands import Factors, Spans, blank, current_device
from gradent.kernels.common.triton_tiles import (
    INTERPRETED,
    LOOSE,
    REACH,
    UNITED,
    Config,
    accumulate,
    is_deep,
    load_tile,
    pick_outer,
    unit,
)

__all__ = ["outer_entries", "outer_kernel", "outer_scratch", "outer_with_gradient"]

PARTIAL = 8
"""Bytes of a tile's sum: float64, or else `sum` would first make a float64 copy of them all."""


def outer_entries(
    u_w: Tensor,
    v_w: Tensor,
    u_l: Tensor,
    v_l: Tensor,
    spans: Spans,
    weight: Tensor | None = None,
    *,
    config: Config | None = None,
    poison: bool = False,
) -> Tensor:
    """Gram entries of k pairs in one launch, by tiles of the weight.

    Costs `2 (T_w + T_l) O I` flops a pair, and `outer_scratch` bytes.

    Args:
        u_w: `[N_w, O]`, float32, bfloat16 or float16, any strides.
        v_w: `[N_w, I]`.
        u_l: `[N_l, O]`.
        v_l: `[N_l, I]`.
        spans: where the tokens of each pair lie.
        weight: `[O, I]` or None; square root of the metric's diagonal, which multiplies every entry of G in float32.
        config: sizes of a tile; None to choose by dtype and sizes.
        poison: fill with nan what the kernel is to write, for a check.

    Returns:
        `[k, 3]` float64 `(‖G_w‖², ‖G_l‖², ⟨G_w, G_l⟩)` on the operands' device, the same bits every time.

    Raises:
        InputError: operands that do not go together, or float64.
    """
    factors = Factors(u_w, v_w, u_l, v_l, spans)
    return _launch(factors, weight, None, None, config or _pick(factors, store=False), poison)


def outer_with_gradient(
    u_w: Tensor,
    v_w: Tensor,
    u_l: Tensor,
    v_l: Tensor,
    spans: Spans,
    coefficients: Tensor,
    weight: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    config: Config | None = None,
    poison: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gram entries of k pairs, and the gradient of the batch out of the same products.

    Each program owns a tile of the gradient, adds pair after pair to it in float32 registers and writes it once: no
    atomics, the same bits every time. Costs as `outer_entries`.

    Args:
        u_w: `[N_w, O]`, float32, bfloat16 or float16, any strides.
        v_w: `[N_w, I]`.
        u_l: `[N_l, O]`.
        v_l: `[N_l, I]`.
        spans: where the tokens of each pair lie.
        coefficients: `[k, 2]`, `(c_w, c_l)` of each pair; used in float32.
        weight: as for `outer_entries`; the gradient is without it.
        out_dtype: of the gradient, rounded once at the end.
        config: sizes of a tile; None to choose by dtype and sizes.
        poison: fill with nan what the kernel is to write, for a check.

    Returns:
        `([k, 3] float64, [O, I])`: the entries, and `Σ_k c_w G_w + c_l G_l`.

    Raises:
        InputError: operands that do not go together, or float64.
    """
    factors = Factors(u_w, v_w, u_l, v_l, spans)
    if coefficients.shape != (len(spans), 2):
        raise InputError(f"coefficients are [pairs, 2] = [{len(spans)}, 2]; got {list(coefficients.shape)}.")
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"out_dtype is float32, bfloat16 or float16; got {out_dtype}.")
    gradient = blank(factors.rows, factors.cols, dtype=out_dtype, device=factors.device, poison=poison)
    entries = _launch(factors, weight, coefficients, gradient, config or _pick(factors, store=True), poison)
    return entries, gradient


def outer_scratch(u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, spans: Spans, *, store: bool = False) -> int:
    """Bytes that `outer_entries` allocates besides its result: three float64 a tile and pair, and a table.

    Args:
        u_w: as for `outer_entries`.
        v_w: as for `outer_entries`.
        u_l: as for `outer_entries`.
        v_l: as for `outer_entries`.
        spans: as for `outer_entries`.
        store: of `outer_with_gradient`, besides its results; with the coefficients.

    Returns:
        Bytes.
    """
    factors = Factors(u_w, v_w, u_l, v_l, spans)
    return len(spans) * (3 * PARTIAL * _tiles(factors, _pick(factors, store=store)) + 4 * 8 + 2 * 4 * store)


def _launch(
    factors: Factors,
    weight: Tensor | None,
    coefficients: Tensor | None,
    gradient: Tensor | None,
    config: Config,
    poison: bool,
) -> Tensor:
    pairs, tiles = len(factors.spans), _tiles(factors, config)
    if weight is not None and weight.shape != (factors.rows, factors.cols):
        raise InputError(f"weight is [{factors.rows}, {factors.cols}]; got {list(weight.shape)}.")
    partials = blank(pairs, 3, tiles, dtype=torch.float64, device=factors.device, poison=poison)
    store = gradient is not None
    programs = tiles if store else pairs * tiles
    uw_t, uw_o, vw_t, vw_i, ul_t, ul_o, vl_t, vl_i = factors.strides
    weight_o, weight_i = weight.stride() if weight is not None else (0, 0)
    unit_o = unit(factors.rows, uw_t, ul_t)
    unit_i = unit(factors.cols, vw_t, vl_t, weight_o)
    if programs:
        with current_device(factors.device):
            outer_kernel[(programs,)](
                factors.u_w,
                factors.v_w,
                factors.u_l,
                factors.v_l,
                factors.spans.table(factors.device),
                weight,
                None if coefficients is None else sent(coefficients.float().contiguous(), factors.device),
                gradient,
                partials,
                tiles,
                pairs,
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
                weight_o // unit_i,
                weight_i,
                UNIT_O=unit_o,
                UNIT_I=unit_i,
                BO=config.rows,
                BI=config.cols,
                DEPTH=config.depth,
                WEIGHTED=weight is not None,
                STORE=store,
                FAR=max(*factors.strides, weight_o, weight_i) >= REACH,
                WIDE=factors.u_w.dtype != factors.v_w.dtype or INTERPRETED,
                num_warps=config.warps,
                num_stages=config.stages,
                enable_fp_fusion=True,
            )
    return partials.sum(2)


def _pick(factors: Factors, *, store: bool) -> Config:
    beside = 1 if store else len(factors.spans)
    deep = is_deep(factors.device)
    return pick_outer(factors.widest, factors.rows, factors.cols, beside, store=store, deep=deep)


def _tiles(factors: Factors, config: Config) -> int:
    return math.ceil(factors.rows / config.rows) * math.ceil(factors.cols / config.cols)


@triton.jit(do_not_specialize=LOOSE, do_not_specialize_on_alignment=UNITED)  # type: ignore[untyped-decorator, unused-ignore]
def outer_kernel(
    u_w: tl.tensor,
    v_w: tl.tensor,
    u_l: tl.tensor,
    v_l: tl.tensor,
    spans: tl.tensor,
    weight: tl.tensor,
    coefficients: tl.tensor,
    gradient: tl.tensor,
    partials: tl.tensor,
    tiles: tl.tensor,
    pairs: tl.tensor,
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
    weight_o: tl.tensor,
    weight_i: tl.tensor,
    UNIT_O: tl.constexpr,
    UNIT_I: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    DEPTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    STORE: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
) -> None:
    """`partials[pair, :, tile]` = a tile's part of the three sums. Grid: pairs × tiles, or tiles alone with STORE."""
    O = O * UNIT_O  # noqa: E741
    I = I * UNIT_I  # noqa: E741
    uw_t = uw_t * UNIT_O
    ul_t = ul_t * UNIT_O
    vw_t = vw_t * UNIT_I
    vl_t = vl_t * UNIT_I
    weight_o = weight_o * UNIT_I
    program = tl.program_id(0)
    tile = program % tiles
    # Eight rows of tiles at a time, column by column: what neighbours read stays in the second-level cache.
    down = tl.cdiv(O, BO)
    across = tl.cdiv(I, BI)
    group = tile // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    inside = tile - group * 8 * across
    row = (group * 8 + inside % height) * BO
    col = inside // height * BI
    if STORE:
        total = tl.zeros((BO, BI), dtype=tl.float32)
        for pair in range(pairs):
            chosen = contract(
                u_w, v_w, spans + pair * 4, row, col, O, I, uw_t, uw_o, vw_t, vw_i, BO, BI, DEPTH, WIDE, FAR
            )
            rejected = contract(
                u_l, v_l, spans + pair * 4 + 2, row, col, O, I, ul_t, ul_o, vl_t, vl_i, BO, BI, DEPTH, WIDE, FAR
            )
            total += tl.load(coefficients + pair * 2) * chosen + tl.load(coefficients + pair * 2 + 1) * rejected
            put_sums(
                chosen,
                rejected,
                weight,
                row,
                col,
                O,
                I,
                weight_o,
                weight_i,
                partials,
                pair,
                tile,
                tiles,
                BO,
                BI,
                WEIGHTED,
                FAR,
            )
        rows = row + tl.arange(0, BO)
        cols = col + tl.arange(0, BI)
        offsets = rows.to(tl.int64)[:, None] * I + cols[None, :]
        mask = (rows < O)[:, None] & (cols < I)[None, :]
        tl.store(gradient + offsets, total.to(gradient.dtype.element_ty), mask=mask)
    else:
        pair = program // tiles
        chosen = contract(u_w, v_w, spans + pair * 4, row, col, O, I, uw_t, uw_o, vw_t, vw_i, BO, BI, DEPTH, WIDE, FAR)
        rejected = contract(
            u_l, v_l, spans + pair * 4 + 2, row, col, O, I, ul_t, ul_o, vl_t, vl_i, BO, BI, DEPTH, WIDE, FAR
        )
        put_sums(
            chosen,
            rejected,
            weight,
            row,
            col,
            O,
            I,
            weight_o,
            weight_i,
            partials,
            pair,
            tile,
            tiles,
            BO,
            BI,
            WEIGHTED,
            FAR,
        )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def contract(
    u: tl.tensor,
    v: tl.tensor,
    span: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.tensor,  # noqa: E741
    u_t: tl.tensor,
    u_o: tl.tensor,
    v_t: tl.tensor,
    v_i: tl.tensor,
    BO: tl.constexpr,
    BI: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
) -> tl.tensor:
    """Tile at `[row, col]` of `uᵀ v` over the tokens of a span, float32."""
    first = tl.load(span)
    length = tl.load(span + 1).to(tl.int32)
    u += first * u_t
    v += first * v_t
    total = tl.zeros((BO, BI), dtype=tl.float32)
    for start in range(0, length, DEPTH):
        left = load_tile(u, start, length, row, O, u_t, u_o, DEPTH, BO, FAR)
        right = load_tile(v, start, length, col, I, v_t, v_i, DEPTH, BI, FAR)
        total = accumulate(total, tl.trans(left), right, WIDE)
    return total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def put_sums(
    chosen: tl.tensor,
    rejected: tl.tensor,
    weight: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.tensor,  # noqa: E741
    weight_o: tl.tensor,
    weight_i: tl.tensor,
    partials: tl.tensor,
    pair: tl.tensor,
    tile: tl.tensor,
    tiles: tl.tensor,
    BO: tl.constexpr,
    BI: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FAR: tl.constexpr,
) -> None:
    """Write the three sums of a tile, weighted entry by entry."""
    if WEIGHTED:
        root = load_tile(weight, row, O, col, I, weight_o, weight_i, BO, BI, FAR).to(tl.float32)
        chosen *= root
        rejected *= root
    place = partials + tl.full((), 3, tl.int64) * pair * tiles + tile
    tl.store(place, tl.sum(chosen * chosen))
    tl.store(place + tiles, tl.sum(rejected * rejected))
    tl.store(place + 2 * tiles, tl.sum(chosen * rejected))
