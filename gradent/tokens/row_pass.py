"""One row's pass at the token level: a forward, and a backward that carries every token's cotangent at once.

`log π(y^a)` is read at one position of the logits. Through the head each token's cotangent stays at its own position,
so one plain backward brings all of them to the head's input. From there on each token has a cotangent of its own (a
*lane*), and lanes go through the rest of the graph by `torch.vmap`, piece by piece.

Letters: m lanes, L tokens of the row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradent.hooks.capture.capture import Capture, Tap
from gradent.hooks.capture.coverage import Survey
from gradent.hooks.uses.uses import Layout, MatrixUse, SumUse
from gradent.kernels.common.numerics import accumulator, spans
from gradent.model.calls import forward_logits
from gradent.model.logprobs import check_logps
from gradent.tokens.schedule import Order, byte_size, find_order

__all__ = ["Arrival", "Lanes", "Leaf", "NoLockstep", "Strand"]


class NoLockstep(Exception):
    """Internal: why a model's tokens cannot share a backward pass."""


@dataclass(frozen=True)
class Lanes:
    """Tokens that share a row.

    Attributes:
        side: 0 for chosen, 1 for rejected.
        tokens: their numbers on that side, increasing.
        ids: the row up to the last of them, int64 `[L]`.
        places: where each is in the row, at least 1.
    """

    side: int
    tokens: Sequence[int]
    ids: Tensor
    places: Sequence[int]


@dataclass(frozen=True)
class Arrival:
    """Cotangents at a use.

    Attributes:
        tap: the recorded use.
        lanes: which lanes these are.
        cotangents: `[m, *shape of the use's output]`; of a use behind the head `[*shape]`, every lane at its position.
    """

    tap: Tap
    lanes: slice
    cotangents: Tensor


@dataclass(frozen=True)
class Leaf:
    """Gradients `[m, *shape]` of a parameter that no rule recorded, by its number, and which lanes these are."""

    number: int
    lanes: slice
    grads: Tensor


class Strand:
    """The pass of one row.

    Args:
        model: the model, in the mode in which it is to be measured.
        parameters: its trainable parameters; their numbers are their places here.
        lanes: the row and its tokens.
        pair: the pair's number, as an error names it.
        trim: form the logits from where the first of the tokens is predicted. Only for a model that `trims`.
        tile: bytes that tokens' distributions over the vocabulary may take at once; one is the least.

    Attributes:
        lanes: as given.
        layout: one row of L tokens.
        taps: recorded uses that the log-probs depend on.
        explicit: numbers of parameters with a use that no rule recorded.
        order: the backward pass.
        head: place in it from which on lanes are apart; 0 where they are from the logits on.
        widest: bytes of the largest gradient of one lane.
        footprint: bytes of all of its gradients, which is about what the forward pass keeps.

    Raises:
        NonFiniteError: a log-prob is nan or infinite.
        NoLockstep: the model hangs hooks on its tensors, which a pass in pieces would run twice.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        lanes: Lanes,
        pair: int,
        *,
        trim: bool = False,
        tile: int = 2**24,
    ) -> None:
        self.lanes, self.layout = lanes, Layout(1, len(lanes.ids))
        self._parameters, self._tile = parameters, tile
        self._capture = Capture(parameters, self.layout, self._arrive)
        self._running: frozenset[Node] = frozenset()
        self._receive: Callable[[Tap, Tensor, int | None], None] = _nowhere
        self._cotangents: list[Tensor | None] = []
        self._chosen_lanes: list[int] = []
        keep = self.layout.length + 1 - lanes.places[0] if trim else 0
        try:
            with torch.enable_grad(), self._capture:
                logits = forward_logits(model, lanes.ids[None], keep=keep)
            if self._capture.meets_hooks:
                raise NoLockstep("it registers hooks on tensors in its forward pass")
            self._root = get_gradient_edge(logits)
            self._logits = logits.detach()
            self._without = self.layout.length - logits.shape[1]  # positions at the start whose logits were not formed
            self._check(pair)
            found = self._capture.survey(logits)
            self.explicit = self._find_explicit(found)
            if self.explicit:  # what lies below some of their uses is different without them
                found = self._capture.survey(logits, self.explicit)
            self.taps = [
                tap
                for tap in self._capture.taps
                if tap.node in found.reached and tap.use.view.param not in self.explicit
            ]
            claimed = frozenset(edge for tap in self.taps for edge in tap.edges)
            self.order: Order = find_order(
                self._root, claimed, frozenset(tap.node for tap in self.taps), self._capture.leaves
            )
            self.head = self._find_head(logits.shape[-1])
            edges = {(edge.node, edge.output_nr): edge for some in self.order.pending[self.head :] for edge in some}
            sizes = [byte_size(edge) for edge in edges.values()]
            self.widest, self.footprint = max(sizes, default=1), sum(sizes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the graph."""
        self._capture.close()
        self._cotangents.clear()
        self._receive = _nowhere

    def _tiles(self, count: int) -> list[slice]:
        """`range(count)` in steps of as many distributions as may be there at once; each is there three times."""
        wide = accumulator(self._logits.dtype).itemsize
        return spans(count, max(1, self._tile // (3 * wide * self._logits.shape[-1])))

    def _check(self, pair: int) -> None:
        """Refuse a log-prob that is not finite."""
        places = torch.tensor(self.lanes.places, device=self._logits.device)
        total = self._logits.new_zeros((), dtype=torch.float64)
        for span in self._tiles(len(places)):
            scores = self._logits[0, places[span] - 1 - self._without].to(accumulator(self._logits.dtype))
            total += scores.log_softmax(-1).gather(1, self.lanes.ids[places[span], None]).sum()
        check_logps(total[None], [pair], [self.lanes.side == 0])

    def _share(self, places: Tensor) -> Tensor:
        """`∂ log π(y^a) / ∂ logits` at a, for the tokens behind some places: `[m, V]`, in the logits' dtype."""
        share = self._logits[0, places - self._without].to(accumulator(self._logits.dtype)).softmax(-1).neg_()
        share[torch.arange(len(places), device=places.device), self.lanes.ids[places + 1]] += 1
        return share.to(self._logits.dtype)

    def _find_explicit(self, found: Survey) -> frozenset[int]:
        depths: dict[int, set[int]] = {}
        for tap in self._capture.taps:
            depths.setdefault(tap.use.view.param, set()).add(tap.use.depth)
        # A fused weight that is used both whole and expert by expert has overlapping slots.
        return found.missed | {number for number, sizes in depths.items() if len(sizes) > 1}

    def _find_head(self, vocabulary: int) -> int:
        """The first place at which all that is under way is narrower than the vocabulary, position by position."""
        taps = {tap.node for tap in self.taps}
        length = self.layout.length
        for place in range(1, len(self.order.nodes)):
            node = self.order.nodes[place - 1]
            if node in taps and _positions(GradientEdge(node, 0)) is None:
                return 0
            if any(place - 1 in places for places in self.order.leaves.values()):
                return 0
            edges = self.order.pending[place]
            if len(edges) != 1:
                continue
            positions = _positions(edges[0])
            meta = edges[0].node._input_metadata[edges[0].output_nr]  # noqa: SLF001  (torch has no public name for it)
            if positions is not None and positions >= length and 2 * meta.shape[-1] <= vocabulary:
                return place
        return 0

    @cached_property
    def held(self) -> list[int]:
        """Bytes that each node of the backward pass makes one hold of a lane."""
        places = {node: place for place, node in enumerate(self.order.nodes)}
        held = [0] * len(self.order.nodes)
        for tap in self.taps:
            held[places[tap.node]] += _held_at(tap)
        return held

    @cached_property
    def lasting(self) -> int:
        """Bytes of a lane that are held beyond their piece: of weights that have several uses behind each other."""
        uses: dict[int, list[int]] = {}
        above = set(self.head_taps())
        for tap in self.taps:
            if tap not in above:
                uses.setdefault(tap.use.view.param, []).append(_held_at(tap))
        return sum(sum(sizes) for sizes in uses.values() if len(sizes) > 1)

    @cached_property
    def behind_head(self) -> int:
        """Bytes of a lane that are held until the head is reduced: a row of each cotangent there."""
        return sum(byte_size(GradientEdge(tap.node, 0)) for tap in self.head_taps()) // self._logits.shape[1]

    def head_taps(self) -> list[Tap]:
        """Uses behind the head, which lanes reach at their own positions alone."""
        above = set(self.order.nodes[: self.head])
        return [tap for tap in self.taps if tap.node in above]

    def start(self, lanes: Sequence[int], *, check: bool = False) -> list[Arrival]:
        """Bring the cotangents of some lanes through the head.

        Args:
            lanes: which, by their places in `lanes.tokens`.
            check: whether to make sure that the head keeps positions apart.

        Returns:
            What arrived behind the head.

        Raises:
            NoLockstep: it does not.
        """
        self._chosen_lanes = list(lanes)
        places = torch.tensor([self.lanes.places[lane] - 1 for lane in lanes], device=self._logits.device)
        numbers = torch.arange(len(places), device=places.device)
        if self.head == 0:
            cotangents = self._logits.new_zeros(len(places), *self._logits.shape)
            for span in self._tiles(len(places)):
                cotangents[numbers[span], 0, places[span] - self._without] = self._share(places[span])
            self._cotangents = [cotangents]
            return []
        total = torch.zeros_like(self._logits)
        edge, middle = self.order.pending[self.head][0], len(places) // 2
        alone: Tensor | None = None
        if check:
            total[0, places[middle] - self._without] = self._share(places[middle, None])[0]
            (alone,) = torch.autograd.grad([self._root], [edge], [total], retain_graph=True)
        for span in self._tiles(len(places)):
            total[0, places[span] - self._without] = self._share(places[span])
        self._running = frozenset(self.order.nodes[: self.head])
        inputs = [edge, *(GradientEdge(tap.node, 0) for tap in self.head_taps())]
        arrived: list[Arrival] = []
        self._receive = lambda tap, cotangent, _: arrived.append(Arrival(tap, slice(0, len(places)), cotangent))
        grad = torch.autograd.grad([self._root], inputs, [total], retain_graph=True, allow_unused=True)[0]
        self._receive = _nowhere
        assert grad is not None
        flat = grad if grad.dim() == 2 else grad[0]
        rows = places + (flat.shape[0] - self.layout.length)
        if alone is not None:
            _check_head(alone.view_as(flat), flat, rows[middle])
        cotangents = flat.new_zeros(len(places), *flat.shape)
        cotangents[numbers, rows] = flat[rows]
        self._cotangents = [cotangents.view(len(places), *grad.shape)]
        return arrived

    def advance(self, start: int, stop: int, step: int, take: Callable[[Arrival | Leaf], None]) -> None:
        """Run one piece of the pass.

        Args:
            start: its first node's place.
            stop: the place after its last.
            step: lanes that are taken at once.
            take: told of what arrives, in the midst of the pass: what it does not keep is gone before the next arrives.
        """
        pairs = zip(self.order.pending[start], self._cotangents, strict=True)
        given = [(edge, grads) for edge, grads in pairs if grads is not None]
        after = self.order.pending[stop]
        lanes = len(self._chosen_lanes)
        nodes = self.order.nodes[start:stop]
        self._running = frozenset(nodes)
        leaves = [
            number for number, places in self.order.leaves.items() if any(start <= place < stop for place in places)
        ]
        sinks = [GradientEdge(node, 0) for node in nodes if node in self.order.sinks]
        inputs: list[Any] = [*after, *(self._parameters[number] for number in leaves), *sinks]
        moved: list[Tensor | None] = [None] * len(after)
        for span in spans(lanes, step) if given and inputs else []:
            self._receive = _receiver(span, len(range(lanes)[span]), take)
            grads = _pull([edge for edge, _ in given], inputs, [grads[span] for _, grads in given])
            for number, grad in enumerate(grads[: len(after)]):
                moved[number] = _placed(moved[number], lanes, span, grad)
            for number, grad in zip(leaves, grads[len(after) :], strict=False):
                if grad is not None:
                    take(Leaf(number, span, grad))
        self._receive = _nowhere
        self._cotangents = moved

    def _arrive(self, tap: Tap, cotangent: Tensor) -> None:
        if tap.node not in self._running:  # at the edge of a piece: it will arrive again, complete
            return
        functorch = torch._C._functorch  # noqa: SLF001  (torch has no public name for what a lane of vmap is)
        if functorch.is_batchedtensor(cotangent):
            self._receive(tap, functorch.get_unwrapped(cotangent), functorch.maybe_get_bdim(cotangent))
        else:
            self._receive(tap, cotangent, None)


def _held_at(tap: Tap) -> int:
    """Bytes that a use makes one hold of a lane."""
    use, size = tap.use, byte_size(GradientEdge(tap.node, 0))
    if isinstance(use, MatrixUse) and not use.transposed:
        return min(size, use.view.shape[0] * use.view.shape[1] * accumulator(use.inputs.dtype).itemsize)
    return 8 if isinstance(use, SumUse) and use.view.ids is None else size


def _check_head(alone: Tensor, together: Tensor, row: Tensor) -> None:
    """Whether one token alone arrives at its own position, and there as it does among the others."""
    want = torch.zeros_like(together)
    want[row] = together[row]
    wide = accumulator(together.dtype)
    error = (alone.to(wide) - want.to(wide)).abs().max()
    limit = 1e-10 if want.dtype == torch.float64 else 1e-5 if want.dtype == torch.float32 else 1e-2
    if float(error) > limit * max(float(want.abs().max()), 1e-30):
        raise NoLockstep("a token's gradient spreads over other positions between its logits and their head's input")


def _nowhere(tap: Tap, cotangent: Tensor, batch: int | None) -> None:
    """Where cotangents go while nothing is to be taken."""


def _receiver(
    span: slice, width: int, take: Callable[[Arrival | Leaf], None]
) -> Callable[[Tap, Tensor, int | None], None]:
    """Passes on what arrives for the lanes of a span; without a lanes' axis, it is the same for all."""

    def receive(tap: Tap, cotangent: Tensor, batch: int | None) -> None:
        whole = cotangent.expand(width, *cotangent.shape) if batch is None else cotangent.movedim(batch, 0)
        take(Arrival(tap, span, whole))

    return receive


def _placed(whole: Tensor | None, lanes: int, span: slice, part: Tensor | None) -> Tensor | None:
    """`whole[span] = part`, made where it is not there yet."""
    if part is None or len(part) == lanes:
        return whole if part is None else part
    if whole is None:
        whole = part.new_zeros(lanes, *part.shape[1:])
    whole[span] = part
    return whole


def _pull(outputs: list[GradientEdge], inputs: list[Any], cotangents: list[Tensor]) -> list[Tensor | None]:
    """`autograd.grad` for every lane at once."""
    there: list[bool] = []

    def pull(*grads: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True)
        there[:] = [grad is not None for grad in found]
        return (*(grad for grad in found if grad is not None), grads[0].new_zeros(()))

    got = iter(torch.vmap(pull)(*cotangents))
    return [next(got) if present else None for present in there]


def _positions(edge: GradientEdge) -> int | None:
    """Positions of a gradient `[1, L, d]` or `[L, d]`; None where it is of another shape."""
    shape = edge.node._input_metadata[edge.output_nr].shape  # noqa: SLF001  (torch has no public name for it)
    if len(shape) == 3 and shape[0] == 1:
        return int(shape[1])
    return int(shape[0]) if len(shape) == 2 else None
