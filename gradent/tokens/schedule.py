"""The schedule of a backward pass: its nodes in the order in which they run, and the places where it can be cut.

A pass that is run piece by piece gives the same gradients, and lets several passes be kept in step.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch.autograd.graph import GradientEdge, Node

from gradent.hooks.capture.coverage import Edge

__all__ = ["BackwardSchedule", "byte_size", "cut_schedule", "find_schedule"]


@dataclass(frozen=True)
class BackwardSchedule:
    """The nodes below a model's output that lead to a recorded use or to an unrecorded parameter."""

    nodes: list[Node]  # every node after all of its consumers, as autograd would run them
    pending: list[tuple[GradientEdge, ...]]  # edges whose gradients are under way before each node, and at the end
    costs: list[int]  # bytes of those gradients
    leaves: dict[int, list[int]]  # a parameter that no rule recorded -> places of the nodes that bring its gradient
    sinks: frozenset[Node]  # nodes with nothing of interest below them

    @cached_property
    def names(self) -> list[str]:
        """The kinds of the nodes: equal for rows of different lengths through the same code."""
        return [node.name() for node in self.nodes]


def byte_size(edge: GradientEdge) -> int:
    """Bytes of the gradient that arrives at an edge."""
    meta = edge.node._input_metadata[edge.output_nr]  # noqa: SLF001  (torch has no public name for it)
    return int(math.prod(meta.shape) * meta.dtype.itemsize)


def find_schedule(
    root: GradientEdge, claimed: frozenset[Edge], uses: frozenset[Node], parameters: Mapping[Node, int]
) -> BackwardSchedule:
    """The schedule below `root`, from the edges that recorded uses claim, their nodes, and the parameters' nodes."""
    below, useful = _useful(root.node, claimed, uses, parameters)
    children = {
        node: [(child, nr) for child, nr in below[node] if child in useful and child not in parameters]
        for node in useful
        if node not in parameters
    }
    waiting: dict[Node, int] = defaultdict(int)
    for edges in children.values():
        for child, _ in edges:
            waiting[child] += 1
    nodes: list[Node] = []
    alive: dict[tuple[Node, int], GradientEdge] = {(root.node, root.output_nr): root}
    arriving: dict[Node, list[tuple[Node, int]]] = defaultdict(list, {root.node: [(root.node, root.output_nr)]})
    pending: list[tuple[GradientEdge, ...]] = [(root,)]
    costs = [byte_size(root)]
    leaves: dict[int, list[int]] = defaultdict(list)
    # The engine runs what was made last first; the number breaks ties, nodes do not compare.
    ready = [(-root.node._sequence_nr(), 0, root.node)]  # noqa: SLF001  (torch has no public name for it)
    pushed, cost = 0, costs[0]
    while ready:
        node = heapq.heappop(ready)[2]
        for edge in arriving.pop(node):
            cost -= byte_size(alive.pop(edge))
        for child, nr in children[node]:
            if (child, nr) not in alive:
                alive[child, nr] = GradientEdge(child, nr)
                arriving[child].append((child, nr))
                cost += byte_size(alive[child, nr])
            waiting[child] -= 1
            if not waiting[child]:
                pushed += 1
                heapq.heappush(ready, (-child._sequence_nr(), pushed, child))  # noqa: SLF001  (as above)
        for child, _ in below[node]:
            if child in parameters:
                leaves[parameters[child]].append(len(nodes))
        nodes.append(node)
        pending.append(tuple(alive.values()))
        costs.append(cost)
    sinks = frozenset(node for node in nodes if not children[node])
    return BackwardSchedule(nodes, pending, costs, dict(leaves), sinks)


def _useful(
    root: Node, claimed: frozenset[Edge], uses: frozenset[Node], parameters: Mapping[Node, int]
) -> tuple[dict[Node, list[tuple[Node, int]]], set[Node]]:
    """Every node's edges, and the nodes at or above a use or an unrecorded parameter."""
    below: dict[Node, list[tuple[Node, int]]] = {}
    useful, closed = set[Node](), set[Node]()
    stack = [root]
    while stack:
        node = stack[-1]
        if node not in below:
            edges = [edge for number, edge in enumerate(node.next_functions) if (node, number) not in claimed]
            below[node] = [(child, nr) for child, nr in edges if child is not None]
            stack.extend(child for child, _ in below[node] if child not in below)
            continue
        stack.pop()
        if node in closed:
            continue
        closed.add(node)
        if node in uses or node in parameters or any(child in useful for child, _ in below[node]):
            useful.add(node)
    return below, useful


# A cut lies where all that is under way arrives at one node. Elsewhere one edge may lie below another, and autograd,
# asked for both, would go on through the upper one.
def cut_schedule(schedule: BackwardSchedule, start: int, held: Sequence[int], limit: int) -> list[int]:
    """Places, from `start` to the end, at which to cut so that no piece keeps more than `limit` bytes."""
    cuts, used, ahead, last = [start], 0, 0, start
    for place in range(start, len(schedule.nodes)):
        single = len({edge.node for edge in schedule.pending[place]}) == 1
        if single and place > start:
            if used and used + ahead > limit:
                cuts.append(last)
                used = 0
            used, ahead, last = used + ahead, 0, place
        ahead += held[place]
    if used and used + ahead > limit:
        cuts.append(last)
    return [*cuts, len(schedule.nodes)] if cuts[-1] < len(schedule.nodes) else cuts
