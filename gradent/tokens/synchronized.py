"""Every token of a pair in one backward pass a row, the passes of all rows in step, each layer reduced as it arrives.

A row and shorter prefixes of it are strands: a token's cotangent is zero behind it, so early tokens take a short row.
All strands run the same piece of the backward pass before any runs the next, so that a parameter's cotangents are there
for all tokens at once, are reduced, and go. Nothing of size tokens × parameters exists.

Letters: n_w and n_l tokens of chosen and rejected, m lanes of a strand, M positions of its row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from gradent.hooks.capture.capture import Tap
from gradent.hooks.uses.uses import LookupUse, MatrixUse, SumUse
from gradent.kernels.common.numerics import accumulator, spans
from gradent.kernels.common.precision import exact_products
from gradent.tokens.contractions import Block, Entries
from gradent.tokens.ledger import Flat, Lone, Odd, Shared, TokenLedger
from gradent.tokens.row_pass import Arrival, Lanes, Leaf, Strand
from gradent.tokens.schedule import byte_size, cut_order

__all__ = ["Lockstep"]

STRANDS = 4
"""Prefixes of a row, at most: each saves its tokens the positions behind them, and costs a forward."""

SHARE = 16
"""Tokens of a strand, at least: below, its forward costs more than it saves."""


class Lockstep:
    """A pair's strands.

    Args:
        model: the model, in the mode in which it is to be measured.
        parameters: its trainable parameters; their numbers are their places here.
        rows: chosen and rejected, `(ids int64 [T], marks bool [T])`.
        whole: take rows as they are, for models that see their length.
        trim: leave out the logits of prompts. Only for a model that `trims`.
        budget: bytes that shorter strands, cotangents, what is held of them, and tiles may take together. The
            activations of the two rows come on top.
        pair: the pair's number, as an error names it.

    Raises:
        NonFiniteError: a log-prob is nan or infinite.
        NoLockstep: the model does not allow it.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        rows: Sequence[tuple[Tensor, Tensor]],
        *,
        whole: bool,
        trim: bool,
        budget: int,
        pair: int,
    ) -> None:
        self._parameters, self._budget = parameters, budget
        tile = max(1024, budget // 8)
        self._strands: list[tuple[Strand, range]] = []  # with the lanes that each is to run

        def strand_of(lanes: Lanes) -> Strand:
            return Strand(model, parameters, lanes, pair, trim=trim, tile=tile)

        try:
            for side, (ids, marks) in enumerate(rows):
                places = marks.nonzero()[:, 0].tolist()
                strand = strand_of(Lanes(side, range(len(places)), ids, places))
                parts = [range(len(places))] if whole else _split(strand, budget // 8)
                self._strands.append((strand, parts[-1]))
                for mine in parts[:-1]:
                    lanes = Lanes(side, mine, ids[: places[mine[-1]] + 1], places[mine.start : mine.stop])
                    self._strands.append((strand_of(lanes), range(len(mine))))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of every graph."""
        for strand, _ in self._strands:
            strand.close()
        self._strands.clear()

    def block_size(self) -> int:
        """Tokens of chosen and rejected together that fit the budget."""
        held = flow = 0
        strands = [strand for strand, _ in self._strands]
        for strand in strands:
            sizes = strand.held
            cuts = cut_order(strand.order, strand.head, sizes, 0)
            held = max(held, *(sum(sizes[start:stop]) for start, stop in pairwise(cuts)))
            flow = max(flow, *(strand.order.costs[cut] for cut in cuts))
        leaves = {number for strand in strands for number in strand.order.leaves}
        explicit = sum(self._parameters[n].numel() * accumulator(self._parameters[n].dtype).itemsize for n in leaves)
        lasting = max(strand.lasting for strand in strands)
        room = self._budget // (4 * (2 * flow + held + explicit) + 2 * lasting)
        # In the head, before the rest: a gradient of one strand's logits, and a row of it for each token of all.
        logits = max(byte_size(strand.order.pending[0][0]) for strand in strands)
        behind = max(strand.behind_head for strand in strands)
        head = max(self._budget // 4, min(self._budget // 2, self._budget - logits)) // max(1, behind)
        return max(2, min(room, head))

    def run(
        self,
        chosen: range,
        rejected: range,
        *,
        check: bool = False,
        advance: Callable[[float], None] | None = None,
    ) -> Iterator[tuple[int, Entries]]:
        """Measure the chosen tokens of one range against the rejected tokens of another.

        Args:
            chosen: numbers of chosen tokens.
            rejected: numbers of rejected tokens.
            check: make sure that the heads keep positions apart.
            advance: told the share of the work that has been done, in steps that add to 1.

        Yields:
            `(parameter number, entries)`, each once; a parameter that no token depends on is absent.

        Raises:
            NoLockstep: `check` failed.
        """
        run = _Run(self._strands, self._parameters, (chosen, rejected), self._budget)
        run.start(check=check)
        cuts = run.cut()
        pieces = max(len(one) for one in cuts) - 1
        yield from run.ledger.take()  # of the head
        for piece in range(pieces):
            run.piece(piece, cuts)
            yield from run.ledger.take()
            if advance is not None:
                advance(1 / pieces)


def _split(strand: Strand, room: int) -> list[range]:
    """Tokens of a row by strand, in order: as many shorter strands as pay and have room for their activations."""
    count = len(strand.lanes.places)
    for strands in range(max(1, min(STRANDS, count // SHARE)), 1, -1):
        parts = [range(part.start, part.stop) for part in spans(count, -(-count // strands))]
        longer = [strand.lanes.places[part[-1]] + 1 for part in parts[:-1]]
        if strand.footprint * sum(longer) <= room * strand.layout.length:
            return parts
    return [range(count)]


_Waits = tuple[Strand, Tap | int]
"""A strand's use, or the number of a parameter that no rule recorded there."""


class _Run:
    """One block of the matrix."""

    def __init__(
        self,
        strands: Sequence[tuple[Strand, range]],
        parameters: Sequence[Tensor],
        block: tuple[range, range],
        budget: int,
    ) -> None:
        self._parameters, self._budget = parameters, budget
        self._lanes: dict[Strand, list[int]] = {}
        for strand, own in strands:
            mine = block[strand.lanes.side]
            lanes = [lane for lane in own if strand.lanes.tokens[lane] in mine]
            if lanes:
                self._lanes[strand] = lanes
        self._first = [side.start for side in block]
        self._tiles = max(1024, budget // 8)
        self._longest = max(strand.layout.length for strand, _ in strands)
        self.ledger = TokenLedger((len(block[0]), len(block[1])), budget=self._tiles)
        self._waiting: dict[int, set[_Waits]] = defaultdict(set)
        self._buffers: dict[_Waits, Tensor] = {}
        for strand in self._lanes:
            for tap in strand.taps:
                self._waiting[tap.use.view.param].add((strand, tap))
            for number in strand.order.leaves:
                self._waiting[number].add((strand, number))

    def _tokens(self, strand: Strand, lanes: slice | None = None) -> list[int]:
        """Numbers of a strand's running tokens within the block."""
        mine = self._lanes[strand] if lanes is None else self._lanes[strand][lanes]
        return [strand.lanes.tokens[lane] - self._first[strand.lanes.side] for lane in mine]

    def start(self, *, check: bool) -> None:
        """Through the heads."""
        for strand, lanes in self._lanes.items():
            arrived = strand.start(lanes, check=check)
            while arrived:  # each holds a gradient of the size of the logits
                self._behind_head(strand, arrived.pop())
            for tap in strand.head_taps():
                self._waiting[tap.use.view.param].discard((strand, tap))
        for param, waiting in list(self._waiting.items()):
            if not waiting:
                self._finish(param)
                continue
            lookups = [key.use for _, key in waiting if isinstance(key, Tap) and isinstance(key.use, LookupUse)]
            if len(lookups) == len(waiting):
                with exact_products(self._parameters[param].device):
                    self.ledger.shrink(param, torch.cat([use.ids.reshape(-1) for use in lookups]))

    def cut(self) -> list[list[int]]:
        """Where each strand's pass is cut: alike, where the passes are alike."""
        longest = max(self._lanes, key=lambda strand: strand.layout.length)
        names = longest.order.names
        lanes = sum(map(len, self._lanes.values()))
        limit = self._budget // 4

        def cut(strand: Strand) -> list[int]:
            return cut_order(strand.order, strand.head, [size * lanes for size in strand.held], limit)

        common = cut(longest)
        return [
            common if strand.head == longest.head and strand.order.names == names else cut(strand)
            for strand in self._lanes
        ]

    def piece(self, number: int, cuts: Sequence[Sequence[int]]) -> None:
        """Run one piece of every strand, and reduce what is complete then."""
        for (strand, lanes), places in zip(self._lanes.items(), cuts, strict=True):
            if number + 1 >= len(places):
                continue
            start, stop = places[number], places[number + 1]
            step = self._step(strand, len(lanes))
            strand.advance(start, stop, step, partial(self._take, strand))
            done = set(strand.order.nodes[start:stop])
            for tap in strand.taps:
                if tap.node in done:
                    self._close(strand, tap)
            for param, found in strand.order.leaves.items():
                if start <= max(found) < stop:
                    self._close(strand, param)
        for param, waiting in list(self._waiting.items()):
            if not waiting:
                self._finish(param)

    def _step(self, strand: Strand, lanes: int) -> int:
        """Lanes that are taken at once: their temporaries are some times their largest gradient."""
        fit = max(1, self._budget // 4 // (8 * strand.widest))
        return -(-lanes // -(-lanes // fit))

    def _finish(self, param: int) -> None:
        del self._waiting[param]
        with exact_products(self._parameters[param].device):
            self.ledger.finish(param)

    def _behind_head(self, strand: Strand, arrival: Arrival) -> None:
        """A use that each lane reaches at its own position: a gradient of rank one."""
        use, cotangent = arrival.tap.use, arrival.cotangents
        lanes, tokens, side = self._lanes[strand], self._tokens(strand), strand.lanes.side
        param, slot = use.view.param, use.view.slot
        places = torch.tensor([strand.lanes.places[lane] - 1 for lane in lanes], device=cotangent.device)
        positions = cotangent.shape[1] if cotangent.dim() == 3 else cotangent.shape[0]
        rows = places + (positions - strand.layout.length)
        if isinstance(use, MatrixUse) and not use.transposed:
            u, v = (factor[0] for factor in use.factors(cotangent, strand.layout))
            if len(u) == len(v) == positions:
                self.ledger.add(param, slot, Lone(side, tokens, u[rows], v[rows]))
                return
        flat = cotangent.reshape(positions, -1)
        for token, row in zip(tokens, rows.tolist(), strict=True):
            alone = torch.zeros_like(flat)
            alone[row] = flat[row]
            if isinstance(use, SumUse) and use.view.ids is None:
                grad = use.token_sums(alone.view(1, *cotangent.shape), self._tiles)
                self.ledger.add(param, slot, Flat(side, [token], grad))
                continue
            for _, where, form in use.forms(alone.view_as(cotangent), strand.layout, self._tiles):
                self.ledger.add(param, where, Odd(side, [token], form))

    def _take(self, strand: Strand, arrival: Arrival | Leaf) -> None:
        """Keep what has arrived at a use, in the smaller of its forms."""
        if isinstance(arrival, Leaf):
            self._take_leaf(strand, arrival.number, arrival.lanes, arrival.grads)
            return
        tap, b = arrival.tap, arrival.cotangents
        use = tap.use
        if isinstance(use, MatrixUse):
            a, made = use.token_factors(b)
            if self._formed(use):
                wide = accumulator(made.dtype)
                with exact_products(made.device):  # here in a backward pass, on a thread of its own
                    grads = torch.matmul(made.mT.to(wide), a.to(wide))  # [m, X, Y]
                made = grads.mT if use.swapped else grads
        elif isinstance(use, LookupUse):
            made = b.reshape(len(b), -1, use.view.shape[1])
        elif isinstance(use, SumUse):
            made = use.token_sums(b, self._tiles)
        else:
            for token, one in zip(self._tokens(strand, arrival.lanes), b, strict=True):
                for _, slot, form in use.forms(one, strand.layout, self._tiles):
                    self.ledger.add(use.view.param, slot, Odd(strand.lanes.side, [token], form))
            return
        self._keep(strand, tap, arrival.lanes, made)

    def _take_leaf(self, strand: Strand, number: int, lanes: slice, grads: Tensor) -> None:
        key = (strand, number)
        grads = grads.to(accumulator(grads.dtype))
        if key in self._buffers:
            self._buffers[key][lanes] += grads
        else:
            self._keep(strand, number, lanes, grads)

    def _keep(self, strand: Strand, key: Tap | int, lanes: slice, values: Tensor) -> None:
        count = len(self._lanes[strand])
        if len(values) == count:
            self._buffers[strand, key] = values
            return
        if (strand, key) not in self._buffers:
            self._buffers[strand, key] = values.new_zeros(count, *values.shape[1:])
        self._buffers[strand, key][lanes] = values

    def _formed(self, use: MatrixUse) -> bool:
        """Whether a use's gradients are smaller than its cotangents: LoRA's second matrix, short weights."""
        return use.inputs.shape[-2 if use.transposed else -1] < self._longest

    def _close(self, strand: Strand, key: Tap | int) -> None:
        """A use's piece has run for all lanes: what was kept goes to the ledger."""
        values = self._buffers.pop((strand, key), None)
        side, tokens = strand.lanes.side, self._tokens(strand)
        if isinstance(key, int):
            self._waiting[key].discard((strand, key))
            if values is not None:
                self.ledger.add(key, (), Flat(side, tokens, values))
            return
        use, view = key.use, key.use.view
        self._waiting[view.param].discard((strand, key))
        if values is None:  # no lane reached it, or it was taken form by form
            return
        if isinstance(use, MatrixUse):
            if self._formed(use):
                self.ledger.add(view.param, view.slot, Flat(side, tokens, values))
                return
            a, _ = use.oriented(values)
            block = Block(side, tokens, values, a.reshape(-1, a.shape[-1]))
            self.ledger.add(view.param, view.slot, Shared(block, not use.swapped))
        elif isinstance(use, LookupUse):
            ids = use.row_ids(0, strand.layout)
            if use.padding_idx is not None:
                real = ids != use.padding_idx
                values, ids = values[:, real], ids[real]
            self.ledger.add(view.param, view.slot, Shared(Block(side, tokens, values, ids), b_on_rows=False))
        elif view.ids is not None:
            block = Block(side, tokens, values, view.ids.reshape(-1))
            self.ledger.add(view.param, (), Shared(block, b_on_rows=False))
        else:
            self.ledger.add(view.param, view.slot, Flat(side, tokens, values))
