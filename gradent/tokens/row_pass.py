"""One row's pass at the token level: a forward, and a backward that carries a gradient for every token at once.

`log π(y^a)` is read at one position of the logits. Through the head each token's gradient stays at its own position, so
one plain backward brings all of them to the head's input. From there on each token has output gradients of its own,
which go through the rest of the graph by `torch.vmap`, piece by piece.

Letters: m tokens that run, L tokens of the row, V vocabulary.
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
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.uses import MatrixUse, SumUse
from gradent.kernels.common.numerics import accumulator, spans
from gradent.model.calls import forward_logits
from gradent.model.facts import tolerance
from gradent.model.logprobs import check_logps
from gradent.tokens.schedule import byte_size, find_schedule

__all__ = ["Arrival", "LeafGradients", "NoSharedBackward", "RowPass", "RowTokens", "put"]


class NoSharedBackward(Exception):
    """Internal: why a model's tokens cannot share a backward pass."""


@dataclass(frozen=True)
class RowTokens:
    """Response tokens of one row: their numbers on their side, and their positions in the row, at least 1."""

    side: int  # 0 for chosen, 1 for rejected
    numbers: Sequence[int]  # increasing
    ids: Tensor  # the row up to the last of them, int64 [L]
    positions: Sequence[int]


@dataclass(frozen=True)
class Arrival:
    """Output gradients `[m, *output]` of some running tokens at a use; in the head one, `[*output]`, for all."""

    tap: Tap
    span: slice
    grad_outputs: Tensor


@dataclass(frozen=True)
class LeafGradients:
    """Gradients `[m, *shape]` for some running tokens of a parameter, by number, that no rule recorded."""

    param: int
    span: slice
    grads: Tensor


class RowPass:
    """The pass of one row; refuses a model that hangs hooks on its tensors, which a pass in pieces would run twice."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        tokens: RowTokens,
        pair: int,
        *,
        trim: bool = False,
        tile: int = 2**24,  # bytes that tokens' distributions over the vocabulary may take at once
    ) -> None:
        self.tokens, self.layout = tokens, Layout(1, len(tokens.ids))
        self._parameters, self._tile = parameters, tile
        self._capture = Capture(parameters, self.layout, self._arrive, folds=False)
        self._nodes: frozenset[Node] = frozenset()  # of the piece that runs
        self._span: slice | None = None  # of the tokens that run; None in the head, where all have one gradient
        self._take: Callable[[Arrival], None] = _ignore
        self._grad_outputs: list[Tensor | None] = []
        self._count = 0  # tokens that run
        keep = self.layout.length + 1 - tokens.positions[0] if trim else 0
        try:
            with torch.enable_grad(), self._capture:
                logits = forward_logits(model, tokens.ids[None], keep=keep)
            if self._capture.meets_hooks:
                raise NoSharedBackward("it registers hooks on tensors in its forward pass")
            self._root = get_gradient_edge(logits)
            self._logits = logits.detach()
            self._skipped = self.layout.length - logits.shape[1]  # positions at the start without logits
            self._check(pair)
            survey = self._capture.survey(logits)
            explicit = self._find_explicit(survey)
            if explicit:  # what lies below some of their uses is different without them
                survey = self._capture.survey(logits, explicit)
            self.taps = [
                tap for tap in self._capture.taps if tap.node in survey.reached and tap.use.view.param not in explicit
            ]
            claimed = frozenset(edge for tap in self.taps for edge in tap.edges)
            uses = frozenset(tap.node for tap in self.taps)
            self.schedule = find_schedule(self._root, claimed, uses, self._capture.leaves)
            self.head = self._find_head(logits.shape[-1])  # the place from which tokens are apart; 0: from the start
            pending = self.schedule.pending[self.head :]
            edges = {(edge.node, edge.output_nr): edge for place in pending for edge in place}
            sizes = [byte_size(edge) for edge in edges.values()]
            self.widest = max(sizes, default=1)  # bytes of the largest gradient of one token
            self.footprint = sum(sizes)  # bytes of all of its gradients, about what the forward pass keeps
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the graph."""
        self._capture.close()
        self._grad_outputs.clear()
        self._take = _ignore

    def _tiles(self, count: int) -> list[slice]:
        """`range(count)` in steps of as many distributions as fit the tile; each is there three times."""
        wide = accumulator(self._logits.dtype).itemsize
        return spans(count, max(1, self._tile // (3 * wide * self._logits.shape[-1])))

    def _check(self, pair: int) -> None:
        """Refuse a log-prob that is not finite."""
        positions = torch.tensor(self.tokens.positions, device=self._logits.device)
        total = self._logits.new_zeros((), dtype=torch.float64)
        for span in self._tiles(len(positions)):
            scores = self._logits[0, positions[span] - 1 - self._skipped].to(accumulator(self._logits.dtype))
            total += scores.log_softmax(-1).gather(1, self.tokens.ids[positions[span], None]).sum()
        check_logps(total[None], [pair], [self.tokens.side == 0])

    def _logit_gradients(self, predicting: Tensor) -> Tensor:
        """`∂ log π(y^a) / ∂ logits` at the positions `[m]` that predict, `[m, V]`, in the logits' dtype."""
        grads = self._logits[0, predicting - self._skipped].to(accumulator(self._logits.dtype)).softmax(-1).neg_()
        grads[torch.arange(len(predicting), device=predicting.device), self.tokens.ids[predicting + 1]] += 1
        return grads.to(self._logits.dtype)

    def _find_explicit(self, survey: Survey) -> frozenset[int]:
        """Numbers of parameters with a use that no rule recorded, or that is used both whole and expert by expert."""
        depths: dict[int, set[int]] = {}
        for tap in self._capture.taps:
            depths.setdefault(tap.use.view.param, set()).add(tap.use.depth)
        return survey.missed | {number for number, sizes in depths.items() if len(sizes) > 1}

    def _find_head(self, vocabulary: int) -> int:
        """The first place at which all that is under way is narrower than the vocabulary, position by position."""
        taps = {tap.node for tap in self.taps}
        for place in range(1, len(self.schedule.nodes)):
            node = self.schedule.nodes[place - 1]
            if node in taps and _positions(GradientEdge(node, 0)) is None:
                return 0
            if any(place - 1 in places for places in self.schedule.leaves.values()):
                return 0
            edges = self.schedule.pending[place]
            if len(edges) != 1:
                continue
            positions = _positions(edges[0])
            meta = edges[0].node._input_metadata[edges[0].output_nr]  # noqa: SLF001  (torch has no public name for it)
            if positions is not None and positions >= self.layout.length and 2 * meta.shape[-1] <= vocabulary:
                return place
        return 0

    @cached_property
    def held(self) -> list[int]:
        """Bytes per token that each node of the backward pass keeps."""
        places = {node: place for place, node in enumerate(self.schedule.nodes)}
        held = [0] * len(self.schedule.nodes)
        for tap in self.taps:
            held[places[tap.node]] += _held_at(tap)
        return held

    @cached_property
    def lasting(self) -> int:
        """Bytes per token that outlive their piece: of weights with several uses below the head."""
        uses: dict[int, list[int]] = {}
        head_taps = set(self.head_taps())
        for tap in self.taps:
            if tap not in head_taps:
                uses.setdefault(tap.use.view.param, []).append(_held_at(tap))
        return sum(sum(sizes) for sizes in uses.values() if len(sizes) > 1)

    @cached_property
    def head_bytes(self) -> int:
        """Bytes per token that are kept until the head is reduced."""
        return sum(byte_size(GradientEdge(tap.node, 0)) for tap in self.head_taps()) // self._logits.shape[1]

    def head_taps(self) -> list[Tap]:
        """Uses in the head, where each token's gradient is at its own position."""
        nodes = set(self.schedule.nodes[: self.head])
        return [tap for tap in self.taps if tap.node in nodes]

    def start(self, running: Sequence[int], *, check: bool = False) -> list[Arrival]:
        """Bring the gradients of some tokens through the head; `check` refuses a head that mixes positions."""
        self._count = len(running)
        device = self._logits.device
        predicting = torch.tensor([self.tokens.positions[index] - 1 for index in running], device=device)
        numbers = torch.arange(len(predicting), device=device)
        if self.head == 0:
            grad_outputs = self._logits.new_zeros(len(predicting), *self._logits.shape)
            for span in self._tiles(len(predicting)):
                places = predicting[span]
                grad_outputs[numbers[span], 0, places - self._skipped] = self._logit_gradients(places)
            self._grad_outputs = [grad_outputs]
            return []
        total = torch.zeros_like(self._logits)
        edge, middle = self.schedule.pending[self.head][0], len(predicting) // 2
        alone: Tensor | None = None
        if check:
            places = predicting[middle, None]
            total[0, places - self._skipped] = self._logit_gradients(places)
            (alone,) = torch.autograd.grad([self._root], [edge], [total], retain_graph=True)
        for span in self._tiles(len(predicting)):
            total[0, predicting[span] - self._skipped] = self._logit_gradients(predicting[span])
        self._nodes = frozenset(self.schedule.nodes[: self.head])
        inputs = [edge, *(GradientEdge(tap.node, 0) for tap in self.head_taps())]
        arrived: list[Arrival] = []
        self._span, self._take = None, arrived.append
        grad = torch.autograd.grad([self._root], inputs, [total], retain_graph=True, allow_unused=True)[0]
        self._take = _ignore
        assert grad is not None
        flat = grad if grad.dim() == 2 else grad[0]
        rows = predicting + (flat.shape[0] - self.layout.length)
        if alone is not None:
            _check_head(alone.view_as(flat), flat, rows[middle])
        grad_outputs = flat.new_zeros(len(predicting), *flat.shape)
        grad_outputs[numbers, rows] = flat[rows]
        self._grad_outputs = [grad_outputs.view(len(predicting), *grad.shape)]
        return arrived

    def advance(self, start: int, stop: int, step: int, take: Callable[[Arrival | LeafGradients], None]) -> None:
        """Run the nodes of one piece for `step` tokens at a time; `take` receives what arrives, which is then freed."""
        pairs = zip(self.schedule.pending[start], self._grad_outputs, strict=True)
        reached = [(edge, grads) for edge, grads in pairs if grads is not None]
        after = self.schedule.pending[stop]
        nodes = self.schedule.nodes[start:stop]
        self._nodes = frozenset(nodes)
        leaves = [
            number for number, places in self.schedule.leaves.items() if any(start <= place < stop for place in places)
        ]
        sinks = [GradientEdge(node, 0) for node in nodes if node in self.schedule.sinks]
        inputs: list[Any] = [*after, *(self._parameters[number] for number in leaves), *sinks]
        moved: list[Tensor | None] = [None] * len(after)
        for span in spans(self._count, step) if reached and inputs else []:
            self._span, self._take = span, take
            grads = _backward([edge for edge, _ in reached], inputs, [grads[span] for _, grads in reached])
            for number, grad in enumerate(grads[: len(after)]):
                if grad is not None:
                    moved[number] = put(moved[number], self._count, span, grad)
            for number, grad in zip(leaves, grads[len(after) :], strict=False):
                if grad is not None:
                    take(LeafGradients(number, span, grad))
        self._take = _ignore
        self._grad_outputs = moved

    def _arrive(self, tap: Tap, grad_output: Tensor) -> None:
        if tap.node not in self._nodes:  # at the edge of a piece: it will arrive again, complete
            return
        functorch = torch._C._functorch  # noqa: SLF001  (torch has no public name for what vmap's tensors are)
        span = self._span
        if functorch.is_batchedtensor(grad_output):
            axis = functorch.maybe_get_bdim(grad_output)
            grad_output = functorch.get_unwrapped(grad_output).movedim(axis, 0)
        elif span is not None:
            grad_output = grad_output.expand(span.stop - span.start, *grad_output.shape)
        self._take(Arrival(tap, span or slice(self._count), grad_output))


def _held_at(tap: Tap) -> int:
    """Bytes per token that a use keeps."""
    use, size = tap.use, byte_size(GradientEdge(tap.node, 0))
    if isinstance(use, MatrixUse) and not use.transposed:
        return min(size, use.view.shape[0] * use.view.shape[1] * accumulator(use.inputs.dtype).itemsize)
    return 8 if isinstance(use, SumUse) and use.view.ids is None else size


def _check_head(alone: Tensor, together: Tensor, row: Tensor) -> None:
    """Refuse a head in which a token's gradient reaches other positions than its own."""
    expected = torch.zeros_like(together)
    expected[row] = together[row]
    wide = accumulator(together.dtype)
    error = (alone.to(wide) - expected.to(wide)).abs().max()
    limit = tolerance("tokens behind the head", [expected.dtype])
    if float(error) > limit * max(float(expected.abs().max()), 1e-30):
        raise NoSharedBackward(
            "a token's gradient spreads over other positions between its logits and their head's input"
        )


def _ignore(arrival: Arrival) -> None:
    """Receives output gradients while nothing is to be taken."""


def put(target: Tensor | None, count: int, span: slice, part: Tensor) -> Tensor:
    """`target[span] = part`, with `target [count, ...]` made where it is not there yet."""
    if len(part) == count:
        return part
    if target is None:
        target = part.new_zeros(count, *part.shape[1:])
    target[span] = part
    return target


def _backward(outputs: list[GradientEdge], inputs: list[Any], grad_outputs: list[Tensor]) -> list[Tensor | None]:
    """`autograd.grad` for every token at once, from output gradients `[m, ...]`."""
    is_used: list[bool] = []

    def pull(*grads: Tensor) -> tuple[Tensor, ...]:
        results = torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True)
        is_used[:] = [grad is not None for grad in results]
        return (*(grad for grad in results if grad is not None), grads[0].new_zeros(()))

    results = iter(torch.vmap(pull)(*grad_outputs))
    return [next(results) if used else None for used in is_used]


def _positions(edge: GradientEdge) -> int | None:
    """Positions of a gradient `[1, L, d]` or `[L, d]`; None where it is of another shape."""
    shape = edge.node._input_metadata[edge.output_nr].shape  # noqa: SLF001  (torch has no public name for it)
    if len(shape) == 3 and shape[0] == 1:
        return int(shape[1])
    return int(shape[0]) if len(shape) == 2 else None
