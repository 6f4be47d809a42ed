"""`G = Σ_t u_t v_tᵀ` in tiles of the weight: multiplied and summed in registers, and stored only where it is wanted.

A program forms the same tile of `G_w` and `G_l` side by side, multiplies it by the metric's root if there is one, and
writes three sums. With `STORE` it goes through all pairs and also adds up `c_w G_w + c_l G_l`, which is what
the trainer's own backward computes. Of a group of more than two rows it forms all tiles before it multiplies them.
Accumulation is float32 within a tile and float64 across tiles; addresses are int64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradent.errors import InputError
from gradent.kernels.common.streams import sent
from gradent.kernels.common.tiles import (
    Config,
    GroupLaunch,
    GroupsPlan,
    group_block,
    group_side,
    is_deep,
    outer_bytes,
    outer_tiles,
    pick_outer,
)
from gradent.kernels.common.triton_operands import (
    CACHED,
    Factors,
    Groups,
    Spans,
    blank,
    couples,
    current_device,
    on_device,
)
from gradent.kernels.common.triton_tiles import INTERPRETED, LOOSE, UNITED, accumulate, arguments, load_tile

__all__ = ["group_kernel", "outer_entries", "outer_kernel", "outer_products", "outer_scratch", "outer_with_gradient"]


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
    """As `gram_entries`, `[k, 3]` float64; a weight `[O, I]`, the metric's root, multiplies each G in float32."""
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
    """The entries, and the gradient `Σ_k c_w G_w + c_l G_l` `[O, I]`, not weighted, from coefficients `[k, 2]`."""
    factors = Factors(u_w, v_w, u_l, v_l, spans)
    if coefficients.shape != (len(spans), 2):
        raise InputError(f"coefficients are [pairs, 2] = [{len(spans)}, 2]; got {list(coefficients.shape)}.")
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"out_dtype is float32, bfloat16 or float16; got {out_dtype}.")
    gradient = blank(factors.rows, factors.cols, dtype=out_dtype, device=factors.device, poison=poison)
    return _launch(factors, weight, coefficients, gradient, config or _pick(factors, store=True), poison), gradient


def outer_scratch(u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, spans: Spans, *, store: bool = False) -> int:
    """Bytes that `outer_entries` (or, with `store`, `outer_with_gradient`) allocates besides its results."""
    factors = Factors(u_w, v_w, u_l, v_l, spans)
    config = _pick(factors, store=store)
    return outer_bytes(factors.rows, factors.cols, len(spans), config, store=store)


def outer_products(
    u: Tensor, v: Tensor, groups: Groups, weight: Tensor | None = None, *, plan: GroupsPlan, poison: bool = False
) -> Tensor:
    """As `gram_products`, float64 `[groups.count]`; a weight `[O, I]`, the metric's root, multiplies each G."""
    factors, split = Factors(u, v, u, v, groups), _split(groups)
    sums = [torch.zeros(0, dtype=torch.float64, device=factors.device)]
    if plan.small:
        pairs = Factors(u, v, u, v, split.small)
        sums.append(_launch(pairs, weight, None, None, plan.small, poison).flatten())
    if plan.large:
        sums.append(_launch_groups(factors, split.large, weight, plan.large, poison).flatten())
    return torch.cat(sums)[on_device(split, "places", factors.device)]


class _Split(NamedTuple):
    """Groups of one and two rows, as pairs; larger ones; and each product's place among the sums of the two."""

    small: Spans
    large: Groups
    places: tuple[int, ...]


@lru_cache(maxsize=CACHED)
def _split(groups: Groups) -> _Split:
    small = [group for group in groups.members if 0 < len(group) < 3]
    large = [group for group in groups.members if len(group) > 2]
    side = group_side(max(map(len, large), default=0))
    places: list[int] = []
    pair, group_start = 0, 3 * len(small)
    for group in groups.members:
        if len(group) > 2:
            places += [group_start + j * side + i for i, j in couples(range(len(group)))]
            group_start += side * side
        elif group:
            places += [pair, pair + 1, pair + 2] if len(group) == 2 else [pair]
            pair += 3
    # A group of one has an empty partner.
    chosen, rejected = [group[0] for group in small], [group[1] if len(group) == 2 else None for group in small]
    spans = Spans(
        [groups.starts[row] for row in chosen],
        [groups.lengths[row] for row in chosen],
        [0 if row is None else groups.starts[row] for row in rejected],
        [0 if row is None else groups.lengths[row] for row in rejected],
    )
    return _Split(spans, Groups(groups.lengths, large, groups.starts), tuple(places))


def _pick(factors: Factors, *, store: bool) -> Config:
    beside, deep = 1 if store else factors.spans.count // 3, is_deep(factors.device)
    return pick_outer(factors.widest, factors.rows, factors.cols, beside, store=store, deep=deep)


def _launch(
    factors: Factors,
    weight: Tensor | None,
    coefficients: Tensor | None,
    gradient: Tensor | None,
    config: Config,
    poison: bool,
) -> Tensor:
    """Entries `[k, 3]` of pairs; fills the gradient if there is one."""
    pairs, tiles = factors.spans.count // 3, outer_tiles(factors.rows, factors.cols, config)
    store = gradient is not None
    sizes, constants = _arguments(factors, config, weight)
    partials = blank(pairs, 3, tiles, dtype=torch.float64, device=factors.device, poison=poison)
    programs = tiles if store else pairs * tiles
    if programs:
        with current_device(factors.device):
            shares = None if coefficients is None else sent(coefficients.float().contiguous(), factors.device)
            table = on_device(factors.spans, "lines", factors.device)
            given = table, weight, shares, gradient, partials, tiles, pairs
            outer_kernel[(programs,)](*factors.operands, *given, *sizes, STORE=store, **constants)
    return partials.sum(2)


def _launch_groups(
    factors: Factors, groups: Groups, weight: Tensor | None, launch: GroupLaunch, poison: bool
) -> Tensor:
    """Products of rows, of which those below the diagonal count, `[G, side, side]` float64, of groups of n > 2."""
    config, most, count, device = launch.config, max(groups.sizes), len(groups.members), factors.device
    side, tiles = group_side(most), outer_tiles(factors.rows, factors.cols, config)
    sizes, constants = _arguments(factors, config, weight, sides=1)
    shape = (launch.together * launch.programs, most, config.rows * config.cols)
    formed = blank(*shape, dtype=torch.float32, device=device, poison=poison)
    partials = blank(count, launch.programs, side, side, dtype=torch.float64, device=device, poison=poison)
    constants |= {"BLOCK": group_block(most), "CHUNK": 16 * config.warps}  # 32 accumulators a thread: 64 spill
    with current_device(device):
        given = on_device(groups, "lines", device), weight, formed, partials, tiles, launch.programs, most
        for skipped in range(0, count if tiles else 0, launch.together):
            programs = min(launch.together, count - skipped) * launch.programs
            group_kernel[(programs,)](*factors.operands[:2], *given, skipped, *sizes, **constants)
    return partials.sum(1)


def _arguments(
    factors: Factors, config: Config, weight: Tensor | None, *, sides: int = 2
) -> tuple[list[int], dict[str, Any]]:
    """`arguments` with those of the outer kernels alone."""
    sizes, constants = arguments(factors, config, weight, sides=sides)
    wide = factors.u_w.dtype != factors.v_w.dtype or INTERPRETED
    return sizes, {**constants, "BO": config.rows, "BI": config.cols, "WEIGHTED": weight is not None, "WIDE": wide}


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
    row, col = corner(tile, O, I, BO, BI)
    sums = partials + tile
    if STORE:
        total = tl.zeros((BO, BI), dtype=tl.float32)
        for pair in range(pairs):
            w = spans + pair * 4
            chosen = contract(u_w, v_w, w, row, col, O, I, uw_t, uw_o, vw_t, vw_i, BO, BI, DEPTH, WIDE, FAR)
            rejected = contract(u_l, v_l, w + 2, row, col, O, I, ul_t, ul_o, vl_t, vl_i, BO, BI, DEPTH, WIDE, FAR)
            total += tl.load(coefficients + pair * 2) * chosen + tl.load(coefficients + pair * 2 + 1) * rejected
            if WEIGHTED:
                root = load_tile(weight, row, O, col, I, weight_o, weight_i, BO, BI, FAR).to(tl.float32)
                chosen *= root
                rejected *= root
            put_sums(chosen, rejected, sums, pair, tiles)
        rows = row + tl.arange(0, BO)
        cols = col + tl.arange(0, BI)
        offsets = rows.to(tl.int64)[:, None] * I + cols[None, :]
        mask = (rows < O)[:, None] & (cols < I)[None, :]
        tl.store(gradient + offsets, total.to(gradient.dtype.element_ty), mask=mask)
    else:
        pair = program // tiles
        w = spans + pair * 4
        chosen = contract(u_w, v_w, w, row, col, O, I, uw_t, uw_o, vw_t, vw_i, BO, BI, DEPTH, WIDE, FAR)
        rejected = contract(u_l, v_l, w + 2, row, col, O, I, ul_t, ul_o, vl_t, vl_i, BO, BI, DEPTH, WIDE, FAR)
        if WEIGHTED:
            root = load_tile(weight, row, O, col, I, weight_o, weight_i, BO, BI, FAR).to(tl.float32)
            chosen *= root
            rejected *= root
        put_sums(chosen, rejected, sums, pair, tiles)


@triton.jit(do_not_specialize=LOOSE, do_not_specialize_on_alignment=UNITED)  # type: ignore[untyped-decorator, unused-ignore]
def group_kernel(
    u: tl.tensor,
    v: tl.tensor,
    spans: tl.tensor,
    weight: tl.tensor,
    formed: tl.tensor,
    partials: tl.tensor,
    tiles: tl.tensor,
    programs: tl.tensor,
    most: tl.tensor,
    skipped: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.tensor,  # noqa: E741
    u_t: tl.tensor,
    u_o: tl.tensor,
    v_t: tl.tensor,
    v_i: tl.tensor,
    weight_o: tl.tensor,
    weight_i: tl.tensor,
    UNIT_O: tl.constexpr,
    UNIT_I: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    FAR: tl.constexpr,
) -> None:
    """`partials[group, program, i, j]` = products of rows over a program's tiles. Grid: groups × programs."""
    O = O * UNIT_O  # noqa: E741
    I = I * UNIT_I  # noqa: E741
    u_t = u_t * UNIT_O
    v_t = v_t * UNIT_I
    weight_o = weight_o * UNIT_I
    program = tl.program_id(0)
    group = spans + (skipped + program // programs) * 2
    lines = spans + tl.load(group) * 2
    count = tl.load(group + 1).to(tl.int32)
    side = tl.cdiv(most, BLOCK) * BLOCK
    wide = tl.full((), 1, tl.int64)
    formed += wide * program * most * (BO * BI)
    partials += wide * (skipped * programs + program) * side * side
    entries = tl.arange(0, BO)[:, None] * BI + tl.arange(0, BI)[None, :]
    block = tl.arange(0, BLOCK)
    for tile in range(program % programs, tiles, programs):
        row, col = corner(tile, O, I, BO, BI)
        tl.debug_barrier()  # the tiles before have been read
        for index in range(count):
            total = contract(u, v, lines + index * 2, row, col, O, I, u_t, u_o, v_t, v_i, BO, BI, DEPTH, WIDE, FAR)
            if WEIGHTED:
                total *= load_tile(weight, row, O, col, I, weight_o, weight_i, BO, BI, FAR).to(tl.float32)
            tl.store(formed + index * (BO * BI) + entries, total)
        tl.debug_barrier()  # these have been written
        for i in range(0, count, BLOCK):
            for j in range(0, i + 1, BLOCK):
                total = tl.zeros((BLOCK, BLOCK, CHUNK), dtype=tl.float32)
                for start in range(0, BO * BI, CHUNK):
                    left = load_tile(formed, i, count, start, BO * BI, BO * BI, 1, BLOCK, CHUNK, False)
                    right = load_tile(formed, j, count, start, BO * BI, BO * BI, 1, BLOCK, CHUNK, False)
                    total += left[:, None, :] * right[None, :, :]
                place = partials + (i + block)[:, None] * side + (j + block)[None, :]
                sums = tl.sum(total, 2).to(tl.float64)
                if tile >= programs:
                    sums += tl.load(place)
                tl.store(place, sums)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def corner(
    tile: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.tensor,  # noqa: E741
    BO: tl.constexpr,
    BI: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where a tile begins: eight rows of tiles at a time, column by column."""
    # What neighbours read stays in the second-level cache.
    down = tl.cdiv(O, BO)
    across = tl.cdiv(I, BI)
    strip = tile // (8 * across)
    height = tl.minimum(down - strip * 8, 8)
    inside = tile - strip * 8 * across
    return (strip * 8 + inside % height) * BO, inside // height * BI


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
def put_sums(chosen: tl.tensor, rejected: tl.tensor, partials: tl.tensor, pair: tl.tensor, tiles: tl.tensor) -> None:
    """Write the three sums of a tile."""
    place = partials + tl.full((), 3, tl.int64) * pair * tiles
    tl.store(place, tl.sum(chosen * chosen))
    tl.store(place + tiles, tl.sum(rejected * rejected))
    tl.store(place + 2 * tiles, tl.sum(chosen * rejected))
