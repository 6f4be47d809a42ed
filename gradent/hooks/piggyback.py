"""Reading Gram entries off a trainer's own backward: no extra forward, no extra backward.

While armed, every forward that builds a graph is captured (`capture.py`), and its output is watched for the
coefficients `c_i` (`readout.py`). The backward then brings each use's cotangent, `c_i` times the one that a measurement
needs; `c_i` is divided out of a factor before any product is formed. Nothing is written to the model, to `.grad` or to
a random state, so the run is the same to the bit; what goes wrong here is kept as a `problem`, never raised into the
trainer's pass.

Letters: N rows of a forward, k pairs, rows 0..k-1 chosen and k..2k-1 rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradent.hooks.capture import Capture, Tap
from gradent.hooks.clock import Clock
from gradent.hooks.collector import Collector, Place
from gradent.hooks.fused_head import FusedHeadUse, find_fused_head
from gradent.hooks.ledger import Ledger
from gradent.hooks.pairing import Pairing, pair_rows
from gradent.hooks.readout import Coefficients, FusedReadout, Readout, RewardReadout, find_readout
from gradent.hooks.regions import in_backward
from gradent.hooks.uses import Layout
from gradent.hooks.views import View
from gradent.model import is_observed

__all__ = ["Passed", "Piggyback"]


@dataclass(eq=False)
class Passed:
    """One backward of the trainer, with the one or two forwards below it, and what it told.

    Attributes:
        rows: `(ids int64 [T], marks bool [T])` of the 2k rows that are paired, real tokens only, on the model's device.
        tokens: each token's own coefficient, float64 `[T]`, of those rows.
        constant: whether a row's tokens share one coefficient.
        c: `∂L/∂log π(y|x)` of those rows, float64 `[2k]`.
        logps: their log-probs (a reward model's rewards), float64 `[2k]`.
        unpaired: rows that found no partner.
        reward: the model is a reward model.
        entries: parameter number -> `[k, 3]` float64, in the order of the backward pass; complete if `problem` is None.
        problem: why there are no entries, or None.
        broken: why not even the coefficients can be used, or None.
    """

    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    constant: bool = True
    c: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    logps: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    unpaired: int = 0
    reward: bool = False
    entries: dict[int, Tensor] = field(default_factory=dict)
    problem: str | None = None
    broken: str | None = None


class Piggyback:
    """Watches a model's forwards, and the backwards through them.

    Args:
        model: the model that the trainer calls, unwrapped.
        parameters: its trainable parameters by name; their numbers are their places here.
        budget: bytes that the reductions' tiles may take.
        pairing: which rows of a forward are chosen, which rejected.
        weight: parameter number -> square root of the metric's diagonal, or None.
        entries: capture uses too; without, only coefficients are read.

    Attributes:
        names: the parameters' names.
        parameters: the parameters.
        clock: the time spent on watching.
        sharded: modules with sharded parameters (FSDP2), each with `{attribute: number}`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        *,
        budget: int,
        pairing: Pairing = "halves",
        weight: Callable[[int], Tensor] | None = None,
        entries: bool = True,
    ) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.model, self.budget, self.pairing, self.weight, self.entries = model, budget, pairing, weight, entries
        self.clock = Clock()
        self.sharded = _owners(model, self.parameters)
        self._handles: list[RemovableHandle] = []
        self._running: _Forward | None = None
        self._groups: list[_Group] = []

    def arm(self) -> None:
        """Watch from now on."""
        if not self._handles:
            self._handles = [
                self.model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
                self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def disarm(self) -> None:
        """Take every hook off the model and let go of every graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._running is not None:
            self._running.leave()
            self._running = None
        for group in self._groups:
            group.close()
        self._groups.clear()

    def take(self) -> list[Passed]:
        """What the backwards since the last call told; their graphs are let go of."""
        groups, self._groups = self._groups, []
        for group in groups:
            group.finish()
        return [group.passed for group in groups if group.started or group.passed.broken is not None]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or in_backward() or self._running is not None or is_observed(self.model):
            return
        try:
            self._enter(args, kwargs)
        except Exception as error:  # noqa: BLE001  (an error here would end the trainer's forward)
            group = _Group(self)
            group.passed.broken, group.started = f"gradent's own {type(error).__name__}: {error}", True
            self._groups.append(group)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids")
        if input_ids is None:
            input_ids = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            return
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            mask = torch.ones_like(input_ids)
        if not self._groups or self._groups[-1].started:
            self._groups.append(_Group(self))
        forward = _Forward(self._groups[-1], input_ids.detach(), mask.detach())
        forward.enter()
        self._running = forward

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward, self._running = self._running, None
        if forward is None:
            return
        forward.leave()
        if output is None:  # the forward raised
            forward.close()
        else:
            forward.group.forwards.append(forward)
            forward.group.guarded(forward.see, output, kwargs)


class _Group:
    """The forwards below one backward: one of pairs, or one of chosen rows and then one of rejected rows."""

    def __init__(self, owner: Piggyback) -> None:
        self.owner = owner
        self.forwards: list[_Forward] = []
        self.passed = Passed()
        self.started = False
        self.expected: list[tuple[_Forward, Tap]] = []
        self.collector: Collector | None = None
        self.hidden = False
        self.grads: list[int] = []

    def guarded(self, function: Callable[..., None], *args: Any) -> None:
        """Run a part of the watching; its errors become the pass's problem, and never the trainer's."""
        try:
            with self.owner.clock:
                function(*args)
        except Exception as error:  # noqa: BLE001  (whatever it is, the training run must go on as if unobserved)
            self.errs(error)

    def errs(self, error: Exception) -> None:
        """Keep an error of gradent's own. Where memory ran out, a pass of gradent's own would need more still."""
        self.fail(f"gradent's own {type(error).__name__}: {error}")
        if isinstance(error, torch.OutOfMemoryError) and self.passed.broken is None:
            self.passed.broken = (
                "memory ran out, also with tiles of a quarter of memory_budget; give gradent a smaller memory_budget, "
                "or measure fewer pairs at once (a smaller batch, accumulated)"
            )
            if self.collector is not None:
                self.collector.clear()

    def fail(self, problem: str) -> None:
        if self.passed.problem is None:
            self.passed.problem = problem

    def start(self, first: _Forward, found: Coefficients) -> None:
        """The backward has reached the first output: settle which row is which."""
        self.started = True
        owner, passed = self.owner, self.passed
        if self.hidden:
            self.grads = [_grad_version(parameter) for parameter in owner.parameters]
        if len(self.forwards) > 2:
            self.fail(f"{len(self.forwards)} forwards preceded the backward")
            passed.broken = passed.problem
            return
        if len(self.forwards) == 2:
            counts = [forward.place.layout.rows for forward in self.forwards]
            if counts[0] != counts[1]:
                passed.broken = f"two forwards of {counts[0]} and {counts[1]} rows preceded the backward"
                return
            for forward, offset in zip(self.forwards, (0, counts[0]), strict=True):
                forward.place = Place(forward.place.layout, range(offset, offset + counts[0]))
            pairs = counts[0]
        else:
            order = pair_rows(owner.pairing, found.c)
            if isinstance(order, str):
                passed.broken = order
                return
            rows = [-1] * first.place.layout.rows
            for position, row in enumerate(order):
                rows[row] = position
            first.place = Place(first.place.layout, rows)
            pairs = len(order) // 2
            passed.unpaired = rows.count(-1)
        passed.c, passed.logps = (torch.zeros(2 * pairs, dtype=torch.float64) for _ in range(2))
        passed.rows = [(torch.zeros(0), torch.zeros(0))] * (2 * pairs)
        passed.tokens = [torch.zeros(0)] * (2 * pairs)
        self.collector = Collector(Ledger(pairs, budget=owner.budget, weight=owner.weight), owner.budget)
        for forward, tap in self.expected:
            self.collector.expect(tap, forward.place)

    def take(self, forward: _Forward, found: Coefficients, *, reward: bool) -> None:
        """What the gradient of one forward's output said."""
        if self.passed.broken is not None:
            return
        if not bool(found.c.isfinite().all()):
            self.fail("the gradient of the log-probs is not finite")
            self.passed.broken = self.passed.problem
            return
        if not found.constant:
            self.passed.constant = False
            self.fail(
                f"the loss weighs the tokens of a response differently (by up to {found.spread:.1e} of the mean weight)"
            )
        self.passed.reward = reward
        for row, position in enumerate(forward.place.rows):
            if position >= 0:
                keep = forward.attention_mask[row].bool()
                marks = found.marks[row].to(keep.device)
                self.passed.rows[position] = (forward.input_ids[row][keep], marks[keep])
                self.passed.tokens[position] = found.tokens[row][keep.cpu()]
                self.passed.c[position], self.passed.logps[position] = found.c[row], found.logp[row]

    def finish(self) -> None:
        """The backward is over."""
        passed = self.passed
        if self.started and passed.problem is None and passed.broken is None and self.collector is not None:
            self.guarded(self._settle, self.collector)
        if self.started and any(not forward.read for forward in self.forwards):
            why = "" if passed.problem is None else f" ({passed.problem})"
            passed.broken = passed.broken or f"the backward did not reach every forward{why}"
        elif not self.started and passed.problem is not None:  # nothing to read was found, so a backward went unseen
            passed.broken = passed.broken or passed.problem
        self.close()

    def _settle(self, collector: Collector) -> None:
        collector.ledger.close()
        self.passed.entries = collector.ledger.entries
        parameters = self.owner.parameters
        # What got a gradient from a hidden region, where no use of it was seen.
        missed = {
            number
            for number, before in enumerate(self.grads)
            if number not in self.passed.entries and _grad_version(parameters[number]) != before
        }
        lost = set(collector.open) | missed
        if lost and self.owner.entries:
            self.fail(f"the backward did not bring all it should for {self.listed(lost)}")

    def listed(self, numbers: Iterable[int]) -> str:
        """Some of the parameters' names, for a message."""
        names = [self.owner.names[number] for number in sorted(numbers)]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    def close(self) -> None:
        for forward in self.forwards:
            forward.close()
        self.expected.clear()
        if self.collector is not None:
            self.collector.clear()


class _Forward:
    """One forward under watch, and the cotangents that came before its coefficients."""

    def __init__(self, group: _Group, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.group, self.input_ids, self.attention_mask = group, input_ids, attention_mask
        self.place = Place(Layout(*input_ids.shape), range(len(input_ids)))
        self.read = False
        self._readout: Readout | None = None
        self._inverse: list[float] = []
        self._queue: list[tuple[Tap, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._reentered: nn.Module | None = None
        self._capture: Capture | None = None
        if group.owner.entries:
            self._adopt_whole_parameters()
            self._capture = Capture(
                group.owner.parameters,
                self.place.layout,
                self._arrive,
                late=self._late,
                on_error=group.errs,
                clock=group.owner.clock,
            )

    def _adopt_whole_parameters(self) -> None:
        """Under FSDP2, let the capture know the whole parameter that a module has while it runs."""
        owned = self.group.owner.sharded
        head = _output_embeddings(self.group.owner.model)

        def adopt(module: nn.Module, args: Any) -> None:
            # A fused head is never called: its weight is whole when a module that shares its shards is.
            capture = self._capture
            for owner in (module, head):
                for name, number in owned.get(owner, {}).items() if owner is not None else ():
                    whole = getattr(owner, name)
                    if capture is not None and not hasattr(whole, "device_mesh"):
                        capture.adopt(number, whole)

        self._handles += [module.register_forward_pre_hook(adopt) for module in owned]

    def enter(self) -> None:
        if self._capture is not None:
            self._capture.start()

    def leave(self) -> None:
        if self._capture is not None:
            self._capture.stop()

    def see(self, output: Any, kwargs: Mapping[str, Any]) -> None:
        """Look at the output: where the coefficients will be read, and whether every use was seen."""
        found = find_readout(output, kwargs, self.input_ids)
        if isinstance(found, str):
            self.group.fail(found)
            return
        self._readout = found
        if self._capture is not None:
            if kwargs.get("output_router_logits") or getattr(output, "aux_loss", None) is not None:
                self.group.fail("the loss has a part (the routers' auxiliary loss) that passes the log-probs by")
            else:
                self._survey(self._capture, found)
        self._handles.append(found.root.register_hook(self._on_grad))  # type: ignore[no-untyped-call]

    def _survey(self, capture: Capture, readout: Readout) -> None:
        if isinstance(readout, FusedReadout):
            self._tap_fused_head(capture, readout)
        found = capture.survey(readout.root, opaque=True)
        if found.missed:
            self.group.fail(f"no rule can tell the rows apart where the model uses {self.group.listed(found.missed)}")
            return
        self.group.hidden |= found.hidden
        self.group.expected += [(self, tap) for tap in capture.taps if tap.node in found.reached]
        if found.hidden or any(not tap.ready for tap in capture.taps):
            self._watch_recomputation()

    def _tap_fused_head(self, capture: Capture, readout: FusedReadout) -> None:
        node = find_fused_head(readout.root)
        if node is None:
            return
        numbers = capture.leaves
        taps = []
        for place, bias in ((1, False), (2, True)):
            child = node.next_functions[place][0] if place < len(node.next_functions) else None
            if child is not None and child in numbers:
                shape = tuple(capture.parameters[numbers[child]].shape)
                view = View(numbers[child], (), shape)
                use = FusedHeadUse(view, node, readout.mask.bool(), bias)
                taps.append(Tap(use, node, frozenset({(node, place)})))
        capture.taps.extend(taps)

        def arrive(grads: Sequence[Tensor | None]) -> None:
            for tap in taps:
                if grads[0] is not None:
                    self._arrive(tap, grads[0])

        if taps:
            self._handles.append(node.register_prehook(arrive))

    def _watch_recomputation(self) -> None:
        """Have the capture see checkpointed regions when they are computed again, during the backward."""
        for module in self.group.owner.model.modules():
            self._handles.append(module.register_forward_pre_hook(self._reenter, prepend=True))
            self._handles.append(module.register_forward_hook(self._releave, always_call=True))

    def _reenter(self, module: nn.Module, args: Any) -> None:
        if self._reentered is None and in_backward() and torch.is_grad_enabled() and self._capture is not None:
            self._reentered = module
            self._capture.start()

    def _releave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._reentered is module and self._capture is not None:
            self._reentered = None
            self._capture.stop()

    def _on_grad(self, grad: Tensor) -> None:
        self.group.guarded(self._read, grad)

    def _read(self, grad: Tensor) -> None:
        assert self._readout is not None
        if self.read:
            self.group.fail("two backward passes went through one forward")
            return
        with torch.no_grad():
            found = self._readout.read(grad)
        if not self.group.started:
            self.group.start(self, found)
        self.read = True
        self.group.take(self, found, reward=isinstance(self._readout, RewardReadout))
        self._inverse = [1 / c if c else 0.0 for c in found.c.tolist()]
        queue, self._queue = self._queue, []
        for tap, cotangent in queue:
            self._arrive(tap, cotangent)

    def _late(self, tap: Tap) -> None:
        if self.group.collector is not None:
            self.group.collector.expect(tap, self.place)

    def _arrive(self, tap: Tap, cotangent: Tensor) -> None:
        self.group.guarded(self._collect, tap, cotangent)

    def _collect(self, tap: Tap, cotangent: Tensor) -> None:
        if self.group.passed.problem is not None or self.group.passed.broken is not None:
            return
        if not self._inverse:
            self._queue.append((tap, cotangent))
            return
        collector, param = self.group.collector, tap.use.view.param
        assert collector is not None
        if param in collector.ledger.entries:
            self.group.fail(f"{self.group.owner.names[param]} is used in more than one reentrant checkpoint")
            return
        collector.arrive(tap, cotangent, self.place, self._inverse)

    def close(self) -> None:
        """Let go of the graph and take off every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._queue.clear()
        self._readout = None
        if self._capture is not None:
            self._capture.close()


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = None if get is None else get()
    except (NotImplementedError, AttributeError):  # a model without such a head
        return None
    return head if isinstance(head, nn.Module) else None


def _owners(model: nn.Module, parameters: Sequence[Tensor]) -> dict[nn.Module, dict[str, int]]:
    """The modules that hold sharded parameters, with the numbers of these."""
    numbers = {
        id(parameter): number for number, parameter in enumerate(parameters) if hasattr(parameter, "device_mesh")
    }
    owners: dict[nn.Module, dict[str, int]] = {}
    for module in model.modules() if numbers else ():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in numbers:
                owners.setdefault(module, {})[name] = numbers[id(parameter)]
    return owners


def _grad_version(parameter: Tensor) -> int:
    """A number that changes when a gradient is accumulated: -1 without a gradient, its version with one."""
    return -1 if parameter.grad is None else parameter.grad._version  # noqa: SLF001  (no public name for it)
