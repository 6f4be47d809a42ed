"""Watching one forward pass: every use of a trainable parameter, whatever the module it happens in.

A `TorchFunctionMode` sees each torch function that the model's code calls. Calls without a trainable operand pass
through untouched. For the others the function's rule says which uses it accounts for; a hook on the output then
receives the cotangent. No module is modified and nothing is hung on the user's parameters: when the graph of the pass
goes, so does everything here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gradent.hooks.graph import Edge, Survey, edges_between, node_of, survey
from gradent.hooks.rules import RULES, Call
from gradent.hooks.uses import Layout, Use
from gradent.hooks.views import View, follow

__all__ = ["Capture", "Tap"]


@dataclass(frozen=True)
class Tap:
    """A recorded use, the node whose cotangent it waits for, and the edges into the parameter that it accounts for."""

    use: Use
    node: Node
    edges: frozenset[Edge]


class Capture(TorchFunctionMode):
    """Records the uses of `parameters` in the forward pass that runs inside `with capture:`.

    Args:
        parameters: the trainable parameters; a parameter's number is its place here.
        layout: the rows of the forward.
        deliver: called with `(tap, cotangent)` when a tap's cotangent arrives during the backward pass. It must not
            keep or modify the cotangent beyond what the rule's forms keep.

    Attributes:
        taps: what was recorded, in forward order.
    """

    def __init__(self, parameters: Sequence[Tensor], layout: Layout, deliver: Callable[[Tap, Tensor], None]) -> None:
        super().__init__()
        self.taps: list[Tap] = []
        self._layout = layout
        self._deliver = deliver
        self._parameters = parameters
        # A tensor's view, and its node when it was made: one that is changed in place afterwards has another.
        self._views: dict[int, tuple[View, Node | None]] = {
            id(parameter): (View(number, (), tuple(parameter.shape)), None)
            for number, parameter in enumerate(parameters)
        }
        self._held: list[Tensor] = []  # views must stay alive: their id is their key
        self._handles: list[RemovableHandle] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tracked = [t for t in _tensors((*args, *kwargs.values())) if self._find(t) is not None]
        if not tracked or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        operands = [(t, node_of(t)) for t in _tensors((*args, *kwargs.values()))]
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.grad_fn is not None:
            self._see(func, args, kwargs, out, tracked, operands)
        return out

    def _see(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Tensor,
        tracked: list[Tensor],
        operands: list[tuple[Tensor, Node | None]],
    ) -> None:
        rule = RULES.get(func)
        uses = rule(Call(args, kwargs, out, self._layout, self._find)) if rule else []
        for use in uses:
            self._tap(use, out, operands)
        if not uses and len(tracked) == 1:
            given = self._find(tracked[0])
            view = None if given is None else follow(func, given, tracked[0], args, kwargs, out)
            if view is not None and id(out) not in self._views:  # a cast with nothing to do returns its argument
                self._views[id(out)] = (view, out.grad_fn)
                self._held.append(out)

    def _tap(self, use: Use, out: Tensor, operands: list[tuple[Tensor, Node | None]]) -> None:
        node = out.grad_fn
        assert node is not None
        stops = [operand for _, operand in operands if operand is not None]
        edges: set[Edge] = set()
        for tensor, operand in operands:
            if operand is not None and self._find(tensor) == use.view:
                edges |= edges_between(node, operand, stops)
        tap = Tap(use, node, frozenset(edges))
        self.taps.append(tap)
        handle = out.register_hook(lambda cotangent: self._deliver(tap, cotangent))  # type: ignore[no-untyped-call]
        self._handles.append(handle)

    def _find(self, operand: Any) -> View | None:
        found = self._views.get(id(operand))
        return found[0] if found is not None and found[1] is operand.grad_fn else None

    def close(self) -> None:
        """Let go of the pass.

        Its graph holds the hooks, which hold this object, which holds the graph's nodes: a ring through C++ that the
        garbage collector does not see, and that would keep every activation.
        """
        for handle in self._handles:
            handle.remove()
        self.taps.clear()
        self._handles.clear()
        self._views.clear()
        self._held.clear()
        self._deliver = _nowhere

    def survey(self, loss: Tensor, without: frozenset[int] = frozenset()) -> Survey:
        """What of the graph below `loss` the recorded uses account for.

        Args:
            loss: the scalar whose backward will run.
            without: numbers of parameters whose recorded uses are to be disregarded.

        Returns:
            The survey; `missed` then includes those of `without` that the loss depends on.
        """
        assert loss.grad_fn is not None
        taps = [tap for tap in self.taps if tap.use.view.param not in without]
        claimed: dict[Edge, frozenset[Node]] = {}
        for tap in taps:
            for edge in tap.edges:
                claimed[edge] = claimed.get(edge, frozenset()) | {tap.node}
        numbers = {node_of(parameter): number for number, parameter in enumerate(self._parameters)}
        parameters = {node: number for node, number in numbers.items() if node is not None}
        return survey(loss.grad_fn, claimed, frozenset(tap.node for tap in taps), parameters)


def _nowhere(tap: Tap, cotangent: Tensor) -> None:
    """Where cotangents go once a pass has been closed."""


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among a call's arguments, one level of lists and tuples deep."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found
