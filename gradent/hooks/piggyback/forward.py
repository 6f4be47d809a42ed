"""One forward of a trainer under watch: its capture, and the cotangents that come before its coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from gradent.hooks.capture.capture import Capture, Tap
from gradent.hooks.capture.checkpointing import current_region, in_backward
from gradent.hooks.capture.row_order import moves_rows
from gradent.hooks.overhead import wait_for
from gradent.hooks.piggyback.backward import WatchedBackward
from gradent.hooks.piggyback.coefficients import FusedReadout, LogitsReadout, Readout, RewardReadout, find_readout
from gradent.hooks.piggyback.trl_fused_head import FusedHeadUse, find_fused_head
from gradent.hooks.reduction.reducers import Place
from gradent.hooks.reduction.weight_grad_reuse import WeightGradReuse
from gradent.hooks.uses.formats import split_factor
from gradent.hooks.uses.parameter_views import View
from gradent.hooks.uses.uses import Layout
from gradent.kernels.common.streams import at_once
from gradent.model.calls import output_embeddings

__all__ = ["WatchedForward", "waits"]

_KNOWN = {"loss", "logits", "log_probs", "entropy", "aux_loss", "router_logits"}
"""Parts of an output that are the log-probs, are made of them, or are looked after elsewhere."""


class WatchedForward:
    """One forward under watch, and the cotangents that came before its coefficients."""

    def __init__(self, group: WatchedBackward, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.group, self.input_ids, self.attention_mask = group, input_ids, attention_mask
        self.place = Place(Layout(*input_ids.shape), range(len(input_ids)))
        self.read = False
        self._readout: Readout | None = None
        self._logits: Node | None = None
        self._version = 0
        self._powers: list[float] = []
        self._spans: dict[bool, list[tuple[int, int]]] = {}
        self._outside: dict[bool, Tensor] = {}
        self._queue: list[tuple[Tap, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._reentered: nn.Module | None = None
        self._capture: Capture | None = None
        self._sharing = (
            WeightGradReuse(group.owner.parameters) if group.owner.share and not group.owner.sharded else None
        )
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
        head = output_embeddings(self.group.owner.model)

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
        """The forward begins."""
        if self._sharing is not None:  # under the capture, which sees a call as the model makes it
            self._sharing.start()
        if self._capture is not None:
            self._capture.start()

    def leave(self) -> None:
        """The forward is over, well or not."""
        if self._capture is not None:
            self._capture.stop()
        if self._sharing is not None:
            self._sharing.stop()

    def see(self, output: Any, kwargs: Mapping[str, Any]) -> None:
        """Look at the output: where the coefficients will be read, and whether every use was seen."""
        found = find_readout(output, kwargs, self.input_ids)
        if isinstance(found, str):
            self.group.fail(found)
            return
        self._readout, self._version = found, found.root._version  # noqa: SLF001  (no public name for it)
        self._logits = found.root.grad_fn if isinstance(found, LogitsReadout) else None
        other = _other_ways(output)
        if self._capture is not None:
            if other is not None and not self.group.owner.trusted:
                self.group.fail(f"the output also holds {other}, through which a loss can pass the log-probs by")
            elif 1 < self.place.layout.rows == self.place.layout.length and moves_rows(found.root):
                self.group.fail("the batch has as many rows as tokens, so that its axes cannot be told apart")
            elif kwargs.get("output_router_logits") or getattr(output, "aux_loss", None) is not None:
                self.group.fail("the loss has a part (the routers' auxiliary loss) that passes the log-probs by")
            else:
                self._survey(self._capture, found)
        self._handles.append(found.root.register_hook(self._on_grad))  # type: ignore[no-untyped-call]

    def _survey(self, capture: Capture, readout: Readout) -> None:
        if isinstance(readout, FusedReadout):
            self._tap_fused_head(capture, readout)
        found = capture.survey(readout.root, opaque=True)
        if found.missed:
            self._fail_for(found.missed)
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
            if any(grad is not None and bool(grad.any()) for grad in grads[1:]):
                self.group.fail("the loss has a part (the head's entropy) that passes the log-probs by")
            for tap in taps:
                if grads[0] is not None:
                    self._arrive(tap, grads[0])

        self._handles.append(node.register_prehook(lambda grads: self.group.guarded(arrive, grads)))

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
            if self.group.hidden and current_region() is None:  # a reentrant region, whose graph is there only now
                self.group.guarded(self._survey_again, self._capture, output)

    def _survey_again(self, capture: Capture, output: Any) -> None:
        if isinstance(output, Mapping):
            output = tuple(output.values())
        parts = output if isinstance(output, (tuple, list)) else [output]
        roots = [part for part in parts if isinstance(part, Tensor) and part.grad_fn is not None]
        missed = frozenset[int]().union(*(capture.survey(root, opaque=True).missed for root in roots))
        if missed:
            self._fail_for(missed)

    def _fail_for(self, missed: frozenset[int]) -> None:
        self.group.fail(f"no rule can tell the rows apart where the model uses {self.group.listed(missed)}")

    def _on_grad(self, grad: Tensor) -> None:
        wait_for(grad.device)
        self.group.guarded(self._read, grad)

    def _read(self, grad: Tensor) -> None:
        if self.read:
            self.group.fail("two backward passes went through one forward")
            return
        assert self._readout is not None
        if self._readout.root._version != self._version:  # noqa: SLF001  (as above)
            self.group.started = self.read = True
            self.group.passed.broken = "the model's output was changed in place after the forward"
            return
        with torch.no_grad():
            found = self._readout.read(grad)
        if not self.group.started:
            self.group.start(self, found)
        self.read = True
        self._note_spans(found.marks)
        self.group.take(self, found, reward=isinstance(self._readout, RewardReadout))
        self._readout = None  # the logits need not outlive the backward's first step
        inverse = [split_factor(1 / c if c else 0.0) for c in found.c.tolist()]
        self._powers = [power for power, _ in inverse]
        self.group.note_rests(self, [rest for _, rest in inverse])
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
        if not self._powers:
            self._queue.append((tap, cotangent))
            return
        collector, param = self.group.collector, tap.use.view.param
        assert collector is not None
        if param in collector.ledger.entries:
            self.group.fail(f"{self.group.owner.names[param]} is used in more than one reentrant checkpoint")
            return
        whole = self.place.layout
        layout = Layout(
            whole.rows, whole.length, partial(self._spans_of, tap, cotangent), certain=waits(cotangent.device)
        )
        collector.arrive(tap, cotangent, Place(layout, self.place.rows), self._powers)

    def _note_spans(self, marks: Tensor) -> None:
        """Where the cotangents of each row may be other than zero, by the tokens that its log-prob is over."""
        length = self.place.layout.length
        first, after = marks.int().argmax(1).tolist(), (length - marks.flip(1).int().argmax(1)).tolist()
        # A token is predicted at the position before it. Above the head's output there is nothing but these.
        self._spans = {False: [(0, stop) for stop in after]}
        self._spans[True] = [(max(0, start - 1), stop) for start, stop in zip(first, after, strict=True)]
        self._outside = {of_logits: _outside(spans, length) for of_logits, spans in self._spans.items()}

    def _spans_of(self, tap: Tap, cotangent: Tensor) -> list[tuple[int, int]] | None:
        """Where a cotangent may be other than zero, if what lies outside of that is zero; else None.

        It is for a causal model; that the model is one, the trainer's forward does not say.

        Args:
            tap: the use.
            cotangent: the gradient at its output.

        Returns:
            `(start, stop)` of each row.
        """
        layout = self.place.layout
        if cotangent.shape[:-1].numel() != layout.rows * layout.length or not cotangent.is_contiguous():
            return None
        of_logits = tap.node is self._logits
        positions = cotangent.flatten(0, -2)
        step = max(1, at_once(cotangent.device) // (positions.shape[1] * positions.element_size()))
        outside = self._outside[of_logits] = self._outside[of_logits].to(cotangent.device)
        for some in torch.split(outside, step) if len(outside) else ():
            lowest, highest = positions.index_select(0, some).aminmax()
            if not waits(cotangent.device):
                self.group.note_still(torch.maximum(lowest.abs(), highest.abs()))
            elif float(lowest) != 0 or float(highest) != 0:
                return None
        return self._spans[of_logits]

    def close(self) -> None:
        """Let go of the graph and take off every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._queue.clear()
        self._readout = self._logits = None
        if self._capture is not None:
            self._capture.close()


def waits(device: torch.device) -> bool:
    """Whether values are looked at as they come; elsewhere work is queued, and a look would wait for all of it."""
    return device.type == "cpu"


def _outside(spans: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Positions of flattened `[R, L]` that lie outside of the rows' spans, int64."""
    inside = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, span in zip(inside, spans, strict=True):
        row[slice(*span)] = True
    return (~inside).flatten().nonzero()[:, 0]


def _other_ways(output: Any) -> str | None:
    """A part of the output, besides the log-probs and what is made of them, by which a gradient can enter the model."""
    for name, value in output.items() if isinstance(output, Mapping) else ():
        if name in _KNOWN:
            continue
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
            return str(name)
    return None
