"""Every token of a pair in one backward pass a row, the passes of all rows in step, each layer reduced as it arrives.

Passes run over a row and over shorter prefixes of it: a token's gradient is zero behind it, so early tokens take a
short row. All passes run the same piece of the backward before any runs the next, so that a parameter's output
gradients are there for all tokens at once, are reduced, and go. Nothing of size tokens × parameters exists.

Letters: m tokens of a pass, M positions of its row.
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
from gradent.tokens.contractions import Gradients, RankOne, SharedFactor, TokenEntries
from gradent.tokens.ledger import OtherForm, Part, TokenLedger
from gradent.tokens.row_pass import Arrival, LeafGradients, RowPass, RowTokens, put
from gradent.tokens.schedule import byte_size, cut_schedule

__all__ = ["SynchronizedPasses"]

PREFIXES = 4
"""Passes of a row, at most: each shorter one saves its tokens the positions behind them, and costs a forward."""

LEAST_TOKENS = 16
"""Tokens of a pass, at least: below, its forward costs more than it saves."""


class SynchronizedPasses:
    """The passes of a pair's rows, `(ids int64 [T], marks bool [T])` of chosen and rejected."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        rows: Sequence[tuple[Tensor, Tensor]],
        *,
        can_split: bool,  # no for models that see the length of a row
        trim: bool,
        budget: int,  # bytes beyond the activations of the two rows
        pair: int,
    ) -> None:
        self._parameters, self._budget = parameters, budget
        tile = max(1024, budget // 8)
        self._passes: list[tuple[RowPass, range]] = []  # with the indices of the tokens that each is to run

        def start_pass(tokens: RowTokens) -> RowPass:
            return RowPass(model, parameters, tokens, pair, trim=trim, tile=tile)

        try:
            for side, (ids, marks) in enumerate(rows):
                positions = marks.nonzero()[:, 0].tolist()
                longest = start_pass(RowTokens(side, range(len(positions)), ids, positions))
                parts = _split(longest, budget // 8) if can_split else [range(len(positions))]
                self._passes.append((longest, parts[-1]))
                for part in parts[:-1]:
                    tokens = RowTokens(side, part, ids[: positions[part[-1]] + 1], positions[part.start : part.stop])
                    self._passes.append((start_pass(tokens), range(len(part))))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of every graph."""
        for row_pass, _ in self._passes:
            row_pass.close()
        self._passes.clear()

    def block_size(self) -> int:
        """Number of chosen and rejected tokens together that fit the budget."""
        piece = flow = 0
        passes = [row_pass for row_pass, _ in self._passes]
        for row_pass in passes:
            sizes = row_pass.held
            cuts = cut_schedule(row_pass.schedule, row_pass.head, sizes, 0)
            piece = max(piece, *(sum(sizes[start:stop]) for start, stop in pairwise(cuts)))
            flow = max(flow, *(row_pass.schedule.costs[cut] for cut in cuts))
        leaves = {number for row_pass in passes for number in row_pass.schedule.leaves}
        explicit = sum(self._parameters[n].numel() * accumulator(self._parameters[n].dtype).itemsize for n in leaves)
        lasting = max(row_pass.lasting for row_pass in passes)
        room = self._budget // (4 * (2 * flow + piece + explicit) + 2 * lasting)
        # In the head, before the rest: a gradient of one pass's logits, and a row of it for each token of all.
        logits = max(byte_size(row_pass.schedule.pending[0][0]) for row_pass in passes)
        head_bytes = max(row_pass.head_bytes for row_pass in passes)
        head = max(self._budget // 4, min(self._budget // 2, self._budget - logits)) // max(1, head_bytes)
        return max(2, min(room, head))

    def run(
        self, chosen: range, rejected: range, *, check: bool = False, advance: Callable[[float], None] | None = None
    ) -> Iterator[tuple[int, TokenEntries]]:
        """Entries by parameter number for some chosen and rejected tokens; `advance` is told shares that add to 1."""
        run = _Run(self._passes, self._parameters, (chosen, rejected), self._budget)
        run.start(check=check)
        cuts = run.cut()
        pieces = max(len(places) for places in cuts) - 1
        yield from run.ledger.pop_entries()  # of the head
        for piece in range(pieces):
            run.run_piece(piece, cuts)
            yield from run.ledger.pop_entries()
            if advance is not None:
                advance(1 / pieces)


def _split(row_pass: RowPass, room: int) -> list[range]:
    """Token indices of a row by pass, in order: as many shorter passes as pay and have room for their activations."""
    count = len(row_pass.tokens.positions)
    for passes in range(max(1, min(PREFIXES, count // LEAST_TOKENS)), 1, -1):
        parts = [range(part.start, part.stop) for part in spans(count, -(-count // passes))]
        lengths = [row_pass.tokens.positions[part[-1]] + 1 for part in parts[:-1]]
        if row_pass.footprint * sum(lengths) <= room * row_pass.layout.length:
            return parts
    return [range(count)]


_Source = tuple[RowPass, Tap | int]
"""A pass's use, or the number of a parameter that no rule recorded there."""


class _Run:
    """One block of the matrix."""

    def __init__(
        self,
        passes: Sequence[tuple[RowPass, range]],
        parameters: Sequence[Tensor],
        block: tuple[range, range],
        budget: int,
    ) -> None:
        self._parameters, self._budget = parameters, budget
        self._running: dict[RowPass, list[int]] = {}  # the indices of the tokens that run
        for row_pass, indices in passes:
            numbers = row_pass.tokens.numbers
            running = [index for index in indices if numbers[index] in block[row_pass.tokens.side]]
            if running:
                self._running[row_pass] = running
        self._first = [side.start for side in block]
        self._tile = max(1024, budget // 8)
        self._longest = max(row_pass.layout.length for row_pass, _ in passes)
        self.ledger = TokenLedger((len(block[0]), len(block[1])), budget=self._tile)
        self._waiting: dict[int, set[_Source]] = defaultdict(set)
        self._buffers: dict[_Source, Tensor] = {}
        for row_pass in self._running:
            for tap in row_pass.taps:
                self._waiting[tap.use.view.param].add((row_pass, tap))
            for number in row_pass.schedule.leaves:
                self._waiting[number].add((row_pass, number))

    def _tokens(self, row_pass: RowPass, span: slice | None = None) -> list[int]:
        """Numbers of a pass's running tokens within the block."""
        running = self._running[row_pass][span or slice(None)]
        return [row_pass.tokens.numbers[index] - self._first[row_pass.tokens.side] for index in running]

    def start(self, *, check: bool) -> None:
        """Run the heads, and reduce what is complete then."""
        for row_pass, running in self._running.items():
            arrived = row_pass.start(running, check=check)
            while arrived:  # each holds a gradient of the size of the logits
                self._add_head_use(row_pass, arrived.pop())
            for tap in row_pass.head_taps():
                self._waiting[tap.use.view.param].discard((row_pass, tap))
        for param, waiting in list(self._waiting.items()):
            if not waiting:
                self._finish(param)
                continue
            lookups = [key.use for _, key in waiting if isinstance(key, Tap) and isinstance(key.use, LookupUse)]
            if len(lookups) == len(waiting):
                with exact_products(self._parameters[param].device):
                    self.ledger.reduce_head(param, torch.cat([use.ids.reshape(-1) for use in lookups]))

    def cut(self) -> list[list[int]]:
        """Places at which each pass is cut, the same for passes through the same nodes."""
        longest = max(self._running, key=lambda row_pass: row_pass.layout.length)
        names = longest.schedule.names
        count = sum(map(len, self._running.values()))
        limit = self._budget // 4

        def cut(row_pass: RowPass) -> list[int]:
            return cut_schedule(row_pass.schedule, row_pass.head, [size * count for size in row_pass.held], limit)

        common = cut(longest)
        return [
            common if row_pass.head == longest.head and row_pass.schedule.names == names else cut(row_pass)
            for row_pass in self._running
        ]

    def run_piece(self, number: int, cuts: Sequence[Sequence[int]]) -> None:
        """Run one piece of every pass, and reduce what is complete then."""
        for (row_pass, running), places in zip(self._running.items(), cuts, strict=True):
            if number + 1 >= len(places):
                continue
            start, stop = places[number], places[number + 1]
            row_pass.advance(start, stop, self._step(row_pass, len(running)), partial(self._take, row_pass))
            done = set(row_pass.schedule.nodes[start:stop])
            for tap in row_pass.taps:
                if tap.node in done:
                    self._hand_over(row_pass, tap)
            for param, nodes in row_pass.schedule.leaves.items():
                if start <= max(nodes) < stop:
                    self._hand_over(row_pass, param)
        for param, waiting in list(self._waiting.items()):
            if not waiting:
                self._finish(param)

    def _step(self, row_pass: RowPass, count: int) -> int:
        """Tokens taken at once: their temporaries are several times their largest gradient."""
        fit = max(1, self._budget // 4 // (8 * row_pass.widest))
        return -(-count // -(-count // fit))

    def _finish(self, param: int) -> None:
        del self._waiting[param]
        with exact_products(self._parameters[param].device):
            self.ledger.finish(param)

    def _add_head_use(self, row_pass: RowPass, arrival: Arrival) -> None:
        """A use that each token reaches at its own position: a gradient of rank one."""
        use, grad_output = arrival.tap.use, arrival.grad_outputs
        tokens, side = self._tokens(row_pass), row_pass.tokens.side
        param, slot = use.view.param, use.view.slot
        predicting = [row_pass.tokens.positions[index] - 1 for index in self._running[row_pass]]
        positions = grad_output.shape[1] if grad_output.dim() == 3 else grad_output.shape[0]
        rows = torch.tensor(predicting, device=grad_output.device) + (positions - row_pass.layout.length)
        if isinstance(use, MatrixUse) and not use.transposed:
            u, v = (factor[0] for factor in use.factors(grad_output, row_pass.layout))
            if len(u) == len(v) == positions:
                self.ledger.add(param, slot, RankOne(side, tokens, u[rows], v[rows]))
                return
        flat = grad_output.reshape(positions, -1)
        for token, row in zip(tokens, rows.tolist(), strict=True):
            alone = torch.zeros_like(flat)
            alone[row] = flat[row]
            if isinstance(use, SumUse) and use.view.ids is None:
                grad = use.token_sums(alone.view(1, *grad_output.shape), self._tile)
                self.ledger.add(param, slot, Gradients(side, [token], grad))
                continue
            for _, where, form in use.forms(alone.view_as(grad_output), row_pass.layout, self._tile):
                self.ledger.add(param, where, OtherForm(side, [token], form))

    def _take(self, row_pass: RowPass, arrival: Arrival | LeafGradients) -> None:
        """Keep what has arrived at a use, as gradients or as output gradients, whichever are smaller."""
        count = len(self._running[row_pass])
        if isinstance(arrival, LeafGradients):
            source = row_pass, arrival.param
            grads = arrival.grads.to(accumulator(arrival.grads.dtype))
            if source in self._buffers:
                self._buffers[source][arrival.span] += grads
            else:
                self._buffers[source] = put(None, count, arrival.span, grads)
            return
        tap, b = arrival.tap, arrival.grad_outputs
        use = tap.use
        if isinstance(use, MatrixUse):
            a, values = use.token_factors(b)
            if self._is_formed(use):
                wide = accumulator(values.dtype)
                with exact_products(values.device):  # here in a backward pass, on a thread of its own
                    grads = torch.matmul(values.mT.to(wide), a.to(wide))  # [m, X, Y]
                values = grads.mT if use.swapped else grads
        elif isinstance(use, LookupUse):
            values = b.reshape(len(b), -1, use.view.shape[1])
        elif isinstance(use, SumUse):
            values = use.token_sums(b, self._tile)
        else:
            for token, grad_output in zip(self._tokens(row_pass, arrival.span), b, strict=True):
                for _, slot, form in use.forms(grad_output, row_pass.layout, self._tile):
                    self.ledger.add(use.view.param, slot, OtherForm(row_pass.tokens.side, [token], form))
            return
        self._buffers[row_pass, tap] = put(self._buffers.get((row_pass, tap)), count, arrival.span, values)

    def _is_formed(self, use: MatrixUse) -> bool:
        """Whether a use's gradients are smaller than its output gradients: LoRA's second matrix, short weights."""
        return use.inputs.shape[-2 if use.transposed else -1] < self._longest

    def _hand_over(self, row_pass: RowPass, source: Tap | int) -> None:
        """Add what was kept of a use, or of a parameter that no rule recorded, complete for all tokens."""
        use = None if isinstance(source, int) else source.use
        param, slot = (source, ()) if isinstance(source, int) else (source.use.view.param, source.use.view.slot)
        self._waiting[param].discard((row_pass, source))
        values = self._buffers.pop((row_pass, source), None)
        if values is None:  # no token reached it, or it was taken form by form
            return
        side, tokens = row_pass.tokens.side, self._tokens(row_pass)
        part: Part = Gradients(side, tokens, values)
        if isinstance(use, MatrixUse) and not self._is_formed(use):
            a, _ = use.oriented(values)
            part = SharedFactor(side, tokens, values, a.reshape(-1, a.shape[-1]), b_on_rows=not use.swapped)
        elif isinstance(use, LookupUse):
            ids = use.row_ids(0, row_pass.layout)
            if use.padding_idx is not None:
                real = ids != use.padding_idx
                values, ids = values[:, real], ids[real]
            part = SharedFactor(side, tokens, values, ids, b_on_rows=False)
        elif use is not None and use.view.ids is not None:
            part, slot = SharedFactor(side, tokens, values, use.view.ids.reshape(-1), b_on_rows=False), ()
        self.ledger.add(param, slot, part)
