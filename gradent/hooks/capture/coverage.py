"""Coverage, from the autograd graph itself: which parameters the recorded uses account for, and which they miss.

Every way from the loss to a parameter ends in an edge of the graph. The uses that the rules recorded *claim* edges.
With the claimed edges cut, a parameter that can still be reached has a use that no rule saw (a fused kernel, a custom
autograd function, an operator without a rule): it must be measured in another way. No list of module classes is
involved, so this holds for models nobody has seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradent.errors import ModelError

__all__ = ["HIDDEN", "Edge", "Survey", "edges_between", "node_of", "survey"]

HIDDEN = (
    "Reentrant gradient checkpointing hides the layers inside it from a measurement. Use "
    "gradient_checkpointing_kwargs={'use_reentrant': False}, or switch checkpointing off meanwhile."
)
"""What a measurement says of a graph with reentrant regions."""

Edge = tuple[Node, int]
"""A node and the number of one of its inputs."""


def node_of(tensor: Tensor) -> Node | None:
    """The node that a tensor's gradient flows into; None where it requires none."""
    if not tensor.requires_grad:
        return None
    return get_gradient_edge(tensor).node if tensor.grad_fn is None else tensor.grad_fn


def edges_between(start: Node, target: Node, stops: Iterable[Node]) -> set[Edge]:
    """Edges into `target` from the nodes that one operator made.

    Args:
        start: the node of the operator's output.
        target: the node of the operand in question.
        stops: nodes of all of the operator's operands, beyond which its own nodes end.

    Returns:
        `(node, input number)` of every edge that enters `target`.
    """
    stopped = {*stops, target}
    found: set[Edge] = set()
    if start in stopped:
        return found
    seen, pending = {start}, [start]
    while pending:
        node = pending.pop()
        for number, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            if child is target:
                found.add((node, number))
            elif child not in stopped and child not in seen:
                seen.add(child)
                pending.append(child)
    return found


@dataclass(frozen=True)
class Survey:
    """What the graph below one forward's log-probs holds.

    Attributes:
        reached: the recorded uses' output nodes that the loss depends on.
        bottoms: those of them with no other recorded use below: a backward that asks for the gradients there runs
            through every use, and computes no weight gradient.
        missed: numbers of the parameters with a use that no rule recorded.
        hidden: reentrant gradient checkpointing hides a part of the graph, of which nothing is said here.
    """

    reached: frozenset[Node]
    bottoms: list[GradientEdge]
    missed: frozenset[int]
    hidden: bool = False


def survey(
    root: Node,
    claimed: Mapping[Edge, frozenset[Node]],
    uses: frozenset[Node],
    parameters: dict[Node, int],
    *,
    opaque: bool = False,
) -> Survey:
    """Walk the graph below `root` once.

    A claim holds only below the output that its use waits at: an output that is changed in place afterwards may hand
    its graph on without that node, and then the use would wait in vain.

    Args:
        root: the node of the loss.
        claimed: edges that the recorded uses account for, with the output nodes of those uses.
        uses: output nodes of the recorded uses.
        parameters: the nodes that accumulate each trainable parameter's gradient, with its number.
        opaque: go on past hidden parts of the graph, instead of raising.

    Returns:
        The survey.

    Raises:
        ModelError: reentrant gradient checkpointing hides a part of the graph.
    """
    missed: set[int] = set()
    hidden = False
    below: dict[Node, bool] = {}  # node -> whether a recorded use lies at it or below it; set when it is finished
    above_bottom: set[Node] = set()
    opened: dict[Node, list[Node]] = {}  # node -> what lies right below it
    pending: list[Node] = [root]
    while pending:
        node = pending[-1]
        children = opened.get(node)
        if children is None:
            children = opened[node] = []
            for number, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    outputs = claimed.get((node, number))
                    if outputs is None or opened.keys().isdisjoint(outputs):
                        children.append(child)
            if node in parameters:
                missed.add(parameters[node])
            if node.name() == "CheckpointFunctionBackward":
                hidden = True
                if not opaque:
                    raise ModelError(HIDDEN)
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
    return Survey(reached, [GradientEdge(node, 0) for node in reached - above_bottom], frozenset(missed), hidden)
