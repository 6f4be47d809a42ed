"""Watching one forward pass: every use of a trainable parameter, whatever the module it happens in.

A `TorchFunctionMode` sees each torch function that the model's code calls. Calls without a trainable operand pass
through untouched. For the others the function's rule says which uses it accounts for; a hook on the output then
receives the output gradient. No module is modified and nothing is hung on the user's parameters: when the graph of the
pass goes, so does everything here.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from gradent.hooks.capture.checkpointing import current_region, in_backward
from gradent.hooks.capture.coverage import Edge, Survey, Tap, edges_between, node_of, survey
from gradent.hooks.capture.row_order import in_order
from gradent.hooks.capture.token_rows import PICKERS, TokenRows
from gradent.hooks.overhead import Clock
from gradent.hooks.rules import RULES, Call
from gradent.hooks.rules.matmul import LINEAR
from gradent.hooks.uses.folded import Folded, FoldedUse, fold
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.parameter_views import View, follow
from gradent.hooks.uses.picked import PickedUse
from gradent.hooks.uses.uses import Use
from gradent.model.sharding import is_released, whole_shape

__all__ = ["Capture", "Tap"]

_Key = tuple[Any, tuple[tuple[int, tuple[int, ...]], ...]]
"""A torch function and the slots among its operands: what a call is recognised by when it is computed again."""


_Pending = tuple[Sequence[Tap], torch.Size]
"""A call's taps and its output's shape, in a checkpointed region: to be recognised when it is computed again."""


class _Seen(NamedTuple):
    """What is noted of a call with a trainable operand before it runs."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tracked: list[Tensor]
    operands: list[tuple[Tensor, Node | None]]
    region: Any
    again: bool


class _Guard:
    """Times what a capture does and hands its errors over, after one of which it is blind; neither without a taker."""

    def __init__(self, on_error: Callable[[Exception], None] | None, clock: Clock) -> None:
        self.on_error, self.clock = on_error, clock
        self.is_blind = False

    def __enter__(self) -> None:
        if self.on_error is not None:
            self.clock.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self.on_error is None:
            return False
        self.clock.__exit__(kind, error, trace)
        if not isinstance(error, Exception):
            return False
        self.is_blind = True
        self.on_error(error)
        return True


class Capture(TorchFunctionMode):
    """Records the uses of `parameters` in the forward pass that runs inside `with capture:`."""

    def __init__(
        self,
        parameters: Sequence[Tensor],  # a parameter's number is its place here
        layout: Layout,
        deliver: Callable[[Tap, Tensor], None],  # takes a tap and its output gradient, which it must not modify
        *,
        # Takes each tap that is recorded while a backward pass runs (reentrant checkpointing). Given, the capture holds
        # no activation of a checkpointed region, and is to be started again when one is recomputed.
        late: Callable[[Tap], None] | None = None,
        # Takes an error of the capture's own; the model runs on unwatched. Without it such an error is raised.
        on_error: Callable[[Exception], None] | None = None,
        clock: Clock | None = None,
        folds: bool = True,  # whether a product of two parameters is followed like a parameter
    ) -> None:
        super().__init__()
        self._folds = folds
        self.taps: list[Tap] = []  # in forward order
        self.meets_hooks = False  # whether the model's own code registered a hook on a tensor
        self._layout = layout
        self._deliver = deliver
        self._late = late
        self._guard = _Guard(on_error, Clock() if clock is None else clock)
        self.parameters = parameters
        # A tensor's view, and its node when it was made: one that is changed in place afterwards has another.
        self._views: dict[int, tuple[View, Node | None]] = {
            id(parameter): (View(number, (), tuple(whole_shape(parameter))), None)
            for number, parameter in enumerate(parameters)
        }
        self._leaves: dict[Node, int] = {}
        self._nodes: dict[int, Node | None] = {}
        self._is_inside = False  # of a call of `_watch_linear`, whose own calls are no uses
        self._linears: list[tuple[Any, Any]] = []  # of each `start`, what stood for `F.linear`, and what stands there
        self._thread = 0  # in which it was started
        self._ordered: set[Node] = set()
        self._tokens = TokenRows(layout)
        self._folded: dict[int, Folded] = {}  # by number, below zero
        self._held: list[Tensor] = []  # views must stay alive: their id is their key
        self._handles: list[RemovableHandle] = []
        self._pending: weakref.WeakKeyDictionary[Any, dict[_Key, deque[_Pending]]] = weakref.WeakKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
        run: Callable[..., Any] | None = None,
    ) -> Any:  # fmt: skip
        """Run a torch function, by itself or by what computes the same in its place, and record what it uses."""
        if func is torch.Tensor.register_hook:
            self.meets_hooks = True
        run, kwargs = run or func, kwargs or {}
        if self._is_inside or self._guard.is_blind or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        is_pick = self._layout.rows > 1 and func in PICKERS
        if not self._concerns(args, kwargs):
            out = run(*args, **kwargs)
            if is_pick:
                with self._guard:
                    self._tokens.note(func, args, kwargs, out)
            return out
        seen = None
        with self._guard:  # what is observed must not suffer from being observed
            seen = self._before(func, args, kwargs)
        self._is_inside = run is not func
        try:
            out = run(*args, **kwargs)
        finally:
            self._is_inside = False
        if seen is not None and isinstance(out, Tensor) and out.grad_fn is not None:
            with self._guard:
                self._record(seen, out)
        elif is_pick:
            with self._guard:
                self._tokens.note(func, args, kwargs, out)
        return out

    def _concerns(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a tracked tensor may be among the arguments: a quick look, as most calls have none."""
        views = self._views
        for value in (*args, *kwargs.values()) if kwargs else args:
            if id(value) in views or isinstance(value, (list, tuple)):
                return True
        return False

    def _before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Seen | None:
        """Note the operands of an operator before it runs; None if none of them is tracked."""
        tensors = _tensors((*args, *kwargs.values()))
        tracked = [tensor for tensor in tensors if self._find(tensor) is not None]
        if not tracked:
            return None
        region = None if self._late is None else current_region()
        again = region is not None and in_backward()
        # The operator may be where the computation is cut short: its operands are taken now.
        if again and self._refill(region, self._key(func, tracked), args, kwargs):
            return None
        operands = [(tensor, self._node(tensor)) for tensor in tensors]
        return _Seen(func, args, kwargs, tracked, operands, region, again)

    def _record(self, seen: _Seen, out: Tensor) -> None:
        """Record the uses that a call's rule accounts for, or else follow the one parameter that it made a view of."""
        if self._folds and self._fold(seen, out):
            return
        region, uses = seen.region, [] if seen.again else self._uses(seen.func, seen.args, seen.kwargs, out)
        for use in uses:  # the tokens may require no gradient, and show in no graph
            inner = use.inner if isinstance(use, FoldedUse) else use
            if isinstance(inner, PickedUse):
                self._tokens.mark(out, inner.rows)
        taps = [self._tap(use, out, seen.operands, region is not None) for use in uses]
        if self._late is not None and in_backward():
            for tap in taps:
                self._late(tap)
        if taps and region is not None:
            key = self._key(seen.func, seen.tracked)
            self._pending.setdefault(region, {}).setdefault(key, deque()).append((taps, out.shape))
        if taps or len(seen.tracked) != 1:
            return
        source = self._find(seen.tracked[0])
        view = None if source is None else follow(seen.func, source, seen.tracked[0], seen.args, seen.kwargs, out)
        if view is not None and id(out) not in self._views:  # a cast with nothing to do returns its argument
            self._views[id(out)] = (view, out.grad_fn)
            self._held.append(out)

    def _key(self, func: Any, tracked: list[Tensor]) -> _Key:
        views = (self._find(tensor) for tensor in tracked)
        return func, tuple((view.param, view.slot) for view in views if view is not None)

    def _uses(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> list[Use]:
        rule = RULES.get(func)
        if rule is None:
            return []
        find = self._find, self._in_order, self._tokens.of, self._tokens.moved
        uses: list[Use] = []
        for use in rule(Call(args, kwargs, out, self._layout, *find)):
            folded = self._folded.get(use.view.param)
            uses += [use] if folded is None else [FoldedUse(use, folded, side) for side in (0, 1)]
        return uses

    def _fold(self, seen: _Seen, out: Tensor) -> bool:
        """Follow what a call makes of two trainable factors like a parameter of its own; whether it makes that."""
        folded = fold(seen.func, seen.args, seen.kwargs, self._find, self._folded)
        if folded is None:
            return False
        number = next((number for number, other in self._folded.items() if other.key == folded.key), None)
        number = -1 - len(self._folded) if number is None else number
        self._folded[number] = folded
        self._views[id(out)] = (View(number, (), tuple(out.shape)), out.grad_fn)
        self._held.append(out)
        return True

    def _in_order(self, tensor: Tensor) -> bool:
        return in_order(tensor, *self._layout.shape, self._ordered)

    def _tap(self, use: Use, out: Tensor, operands: list[tuple[Tensor, Node | None]], is_checkpointed: bool) -> Tap:
        node = out.grad_fn
        assert node is not None
        stops = [operand for _, operand in operands if operand is not None]
        edges: set[Edge] = set()
        met = use.inner.view if isinstance(use, FoldedUse) else use.view
        for tensor, operand in operands:
            if operand is not None and self._find(tensor) == met:
                edges |= edges_between(node, operand, stops)
        held = use.without_activations if is_checkpointed else use
        tap = Tap(held, node, frozenset(edges), ready=held is use)
        self.taps.append(tap)
        # A partial: a function and the two cells that it closes over are more for the garbage collector to walk.
        deliver = partial(self._deliver if tap.ready else self._deliver_when_ready, tap)
        handle = out.register_hook(deliver)  # type: ignore[no-untyped-call]
        self._handles.append(handle)
        return tap

    def _deliver_when_ready(self, tap: Tap, grad_output: Tensor) -> None:
        if tap.ready:
            self._deliver(tap, grad_output)
        else:
            tap.early = grad_output

    def _refill(self, region: Any, key: _Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Give the taps of a recomputed call their operands; whether the call was a recorded one."""
        calls = self._pending.get(region, {}).get(key)
        if not calls:
            return False
        taps, shape = calls.popleft()
        uses = self._uses(key[0], args, kwargs, torch.empty(shape, device="meta"))
        for tap, use in zip(taps, uses, strict=False):
            if tap.use.view == use.view and not tap.ready:
                tap.use, tap.ready = use, True
                if tap.early is not None:
                    grad_output, tap.early = tap.early, None
                    self._deliver(tap, grad_output)
        return True

    def _find(self, operand: Any) -> View | None:
        view, node = self._views.get(id(operand), (None, None))
        return view if view is not None and node is operand.grad_fn else None

    def _node(self, tensor: Tensor) -> Node | None:
        """`node_of`, cached for tracked leaves, for which it runs an operator; None of one that is released."""
        if tensor.grad_fn is not None or id(tensor) not in self._views:
            return node_of(tensor)
        if id(tensor) not in self._nodes:
            if is_released(tensor):  # a node that is made now, and kept, would take the gradient of an empty tensor
                return None
            self._nodes[id(tensor)] = node_of(tensor)
        return self._nodes[id(tensor)]

    @property
    def leaves(self) -> dict[Node, int]:
        """The nodes at which the parameters' gradients arrive, with their numbers."""
        numbers = {self._node(parameter): number for number, parameter in enumerate(self.parameters)}
        return {node: number for node, number in numbers.items() if node is not None} | self._leaves

    def adopt(self, number: int, tensor: Tensor) -> None:
        """Take a tensor for a parameter: the full one that stands in for its shards while a module runs."""
        if id(tensor) not in self._views:
            self._views[id(tensor)] = (View(number, (), tuple(tensor.shape)), None)
            self._held.append(tensor)
            node = node_of(tensor)
            if node is not None:
                self._leaves[node] = number

    def __enter__(self) -> Self:
        """Record from here on."""
        super().__enter__()  # type: ignore[no-untyped-call]
        # DeepSpeed leaves one autograd function of its own in the place of `F.linear`, which no mode sees.
        original, self._thread = F.linear, threading.get_ident()
        is_deepspeed = getattr(original, "__module__", None) == "deepspeed.runtime.zero.linear"
        mine = partial(self._watch_linear, original) if is_deepspeed else original
        self._linears.append((original, mine))
        F.linear = mine
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Record no more."""
        original, mine = self._linears.pop()
        if F.linear is mine:
            F.linear = original
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def _watch_linear(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return original(*args, **kwargs)
        return self.__torch_function__(LINEAR, (), args, kwargs, run=original)

    def start(self) -> None:
        """`__enter__`, for a pass that ends in another function."""
        self.__enter__()

    def stop(self) -> None:
        """`__exit__`, after `start`."""
        self.__exit__(None, None, None)
        if in_backward():  # or the graph of what was computed again would be held, with its activations
            self._tokens.clear()
            self._ordered.clear()

    def close(self) -> None:
        """Let go of the pass."""
        # Its graph holds the hooks, which hold this object, which holds the graph's nodes: a ring through C++ that the
        # garbage collector does not see, and that would keep every activation.
        for handle in self._handles:
            handle.remove()
        held: tuple[Any, ...] = (self.taps, self._pending, self._leaves, self._nodes, self._ordered, self._handles)
        for part in (*held, self._views, self._held, self._tokens, self._folded):
            part.clear()
        self._deliver = lambda tap, grad_output: None

    def survey(self, loss: Tensor, without: frozenset[int] = frozenset(), *, opaque: bool = False) -> Survey:
        """Which uses and parameters the graph below `loss` reaches, uses of the parameters `without` disregarded."""
        taps, leaves = [tap for tap in self.taps if tap.use.view.param not in without], self.leaves
        released = {id(part): number for number, part in enumerate(self.parameters) if id(part) not in self._nodes}
        return survey(loss, taps, leaves, released, opaque=opaque)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among a call's arguments, one level of lists and tuples deep."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors.extend(item for item in value if isinstance(item, Tensor))
    return tensors
