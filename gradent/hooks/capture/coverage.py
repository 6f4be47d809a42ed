"""Coverage, from the autograd graph itself: which parameters the recorded uses account for, and which they miss.

Every way from the loss to a parameter ends in an edge of the graph. The uses that the rules recorded *claim* edges.
With the claimed edges cut, a parameter that can still be reached has a use that no rule saw (a fused kernel, a custom
autograd function, an operator without a rule) and must be measured in another way. No list of module classes is
involved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradent.errors import ModelError
from gradent.hooks.uses.uses import Use
from gradent.model.autograd import REENTRANT

__all__ = ["Edge", "Survey", "Tap", "edges_between", "node_of", "survey"]

_LEAF = "torch::autograd::AccumulateGrad"

Edge = tuple[Node, int]
"""A node and the number of one of its inputs."""


@dataclass(eq=False)
class Tap:
    """A recorded use, the node whose output gradient it waits for, and the edges that it accounts for."""

    use: Use  # without activations while `ready` is false
    node: Node  # of the operator's output
    edges: frozenset[Edge]  # into the parameter
    ready: bool = True  # the use holds its operands; in a checkpointed region they come when it is computed again
    early: Tensor | None = None  # an output gradient that arrived before the operands


def node_of(tensor: Tensor) -> Node | None:
    """The node that a tensor's gradient flows into; None where it requires none."""
    if not tensor.requires_grad:
        return None
    return get_gradient_edge(tensor).node if tensor.grad_fn is None else tensor.grad_fn


def edges_between(start: Node, target: Node, stops: Iterable[Node]) -> set[Edge]:
    """Edges into `target` that one operator made, between its output's node and its operands' nodes, `stops`."""
    seen, edges = {*stops, target}, set[Edge]()
    pending = [] if start in seen else [start]
    while pending:
        node = pending.pop()
        seen.add(node)
        for number, (child, _) in enumerate(node.next_functions):
            if child is target:
                edges.add((node, number))
            elif child is not None and child not in seen:
                seen.add(child)
                pending.append(child)
    return edges


@dataclass(frozen=True)
class Survey:
    """What the graph below one forward's log-probs holds."""

    reached: frozenset[Node]  # the recorded uses' output nodes that the loss depends on
    # Those with no use below: a backward that asks for gradients there runs through all, without weight gradients.
    bottoms: list[GradientEdge]
    missed: frozenset[int]  # numbers of the parameters with a use that no rule recorded
    foreign: str | None = None  # a trainable parameter that is reached and is none of the known ones, in words
    hidden: bool = False  # reentrant gradient checkpointing hides a part of the graph, of which nothing is said here


def survey(
    loss: Tensor, taps: Sequence[Tap], parameters: Mapping[Node, int], released: Mapping[int, int] | None = None,
    *, opaque: bool = False,
) -> Survey:  # fmt: skip
    """Walk the graph below `loss` once: which uses it reaches, and which parameters have a use that none claims.

    Of parameters that are `released` (id -> number) no node may be asked for: theirs are known as they are met.
    """
    assert loss.grad_fn is not None
    uses, claimed = frozenset(tap.node for tap in taps), dict[Edge, frozenset[Node]]()
    for tap in taps:
        for edge in tap.edges:
            claimed[edge] = claimed.get(edge, frozenset()) | {tap.node}
    missed: set[int] = set()
    hidden = False
    foreign: str | None = None
    # A claim holds only below the output that its use waits at: an output that is changed in place afterwards may hand
    # its graph on without that node, and then the use would wait in vain.
    below: dict[Node, bool] = {}  # node -> whether a recorded use lies at it or below it; set when it is finished
    above_bottom: set[Node] = set()
    opened: dict[Node, list[Node]] = {}  # node -> what lies right below it
    pending: list[Node] = [loss.grad_fn]
    while pending:
        node = pending[-1]
        children = opened.get(node)
        if children is None:
            children = opened[node] = []
            for place, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    outputs = claimed.get((node, place))
                    if outputs is None or opened.keys().isdisjoint(outputs):
                        children.append(child)
            number = parameters.get(node)
            if number is None and released and node.name() == _LEAF:
                number = released.get(id(node.variable))  # type: ignore[attr-defined]
            if number is not None:
                missed.add(number)
            else:
                foreign = foreign or _foreign(node)
            if node.name() == "CheckpointFunctionBackward":
                hidden = True
                if not opaque:
                    raise ModelError(REENTRANT)
            pending.extend(child for child in children if child not in opened)
            continue
        pending.pop()
        if node in below:
            continue
        inside = any(below.get(child, False) for child in children)
        if inside and node in uses:
            above_bottom.add(node)
        below[node] = inside or node in uses
    reached = uses & opened.keys()
    return Survey(
        reached, [GradientEdge(node, 0) for node in reached - above_bottom], frozenset(missed), foreign, hidden
    )


def _foreign(node: Node) -> str | None:
    """What a leaf's tensor is where it is a parameter; None for other nodes, and for activations."""
    tensor = getattr(node, "variable", None)
    return f"a {type(tensor).__name__} of shape {list(tensor.shape)}" if isinstance(tensor, nn.Parameter) else None
