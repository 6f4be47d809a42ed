"""One forward of a trainer under watch: its recorded uses, and the output gradients that its backward brings.

Letters: N rows of L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from gradent.hooks.piggyback.coefficients import (
    Coefficients,
    FusedReadout,
    LogitsReadout,
    Readout,
    ValueReadout,
    find_readout,
)
from gradent.hooks.piggyback.config import WatchConfig
from gradent.hooks.piggyback.guard import Guard
from gradent.hooks.piggyback.packed import PackedReadout, find_packed_readout
from gradent.hooks.piggyback.trl_fused_head import find_fused_head, tap_fused_head
from gradent.hooks.reduction.collector import Collector, Place
from gradent.hooks.reduction.weight_grad_reuse import WeightGradReuse
from gradent.hooks.uses.formats import split_factor
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.packed_rows import PackedRows
from gradent.kernels.common.streams import at_once
from gradent.model.inputs import FurtherInputs
from gradent.model.parameters import output_embeddings
from gradent.model.sharding import is_sharded

__all__ = ["WatchedForward", "is_synchronous"]

_KNOWN_OUTPUTS = {"loss", "logits", "log_probs", "entropy", "aux_loss", "router_logits"}
"""Parts of an output that are the log-probs, are made of them, or are looked after elsewhere."""

_OnCoefficients = Callable[["WatchedForward", Coefficients], tuple[Place, Collector] | None]


class WatchedForward:
    """Captures a forward, reads the rows' coefficients when its backward starts, and collects output gradients."""

    def __init__(
        self, config: WatchConfig, guard: Guard, on_coefficients: _OnCoefficients, input_ids: Tensor, mask: Tensor,
        inputs: FurtherInputs, packed: PackedRows | None = None,
    ) -> None:  # fmt: skip
        # Of R rows, also where the model gets them packed.
        self.input_ids, self.attention_mask, self.inputs = input_ids, mask, inputs
        # A head that is asked for the last tokens alone has these.
        rows, length = input_ids.shape
        tokens = () if inputs.has_one_a_row else (length, *inputs.kept)
        self.layout = Layout(rows, length, tokens=tokens, packed=packed)
        self.expected: list[Tap] = []  # recorded uses whose output gradients the backward will bring
        self.has_hidden_regions = False  # a reentrant checkpoint hides a part of the graph
        self.is_half = False  # output gradients of it are float16
        self.is_read = False  # the backward has reached the output
        self.remainders: list[float] = []  # of each row's `1 / c`, beside the power of two that gradients are scaled by
        self.padding_gradients: list[Tensor] = []  # scalars on the model's device, zero where padding got no gradient
        self._config, self._guard, self._on_coefficients = config, guard, on_coefficients
        self._readout: Readout | PackedReadout | None = None
        self._logits: Node | None = None
        self._version = 0
        self._place: Place | None = None
        self._collector: Collector | None = None
        self._powers: list[float] = []
        self._spans: dict[bool, list[tuple[int, int]]] = {}
        self._outside: dict[bool, Tensor] = {}
        self._queue: list[tuple[Tap, Tensor]] = []  # output gradients that arrived before the coefficients
        self._handles: list[RemovableHandle] = []
        self._recomputed: nn.Module | None = None
        self._sharing: WeightGradReuse | None = None
        self._capture: Capture | None = None
        if config.has_entries:
            if config.should_share and not is_sharded(config.model):
                self._sharing = WeightGradReuse(config.tensors)
            self._capture = Capture(
                config.tensors, self.layout, self._arrive, late=self._expect_late, on_error=guard.keep_error,
                clock=guard.clock,
            )  # fmt: skip
            self._adopt_whole_parameters(self._capture)

    def _adopt_whole_parameters(self, capture: Capture) -> None:
        """Under FSDP2, let the capture know the whole parameter that a module has while it runs."""
        sharded = self._config.sharded
        head = output_embeddings(self._config.model)

        def adopt(module: nn.Module, args: Any) -> None:
            # A fused head is never called: its weight is whole when a module that shares its shards is.
            for holder in (module,) if head is None else (module, head):
                for name, number in sharded.get(holder, {}).items():
                    tensor = getattr(holder, name)
                    if not hasattr(tensor, "device_mesh"):
                        capture.adopt(number, tensor)

        self._handles += [module.register_forward_pre_hook(adopt) for module in sharded]

    def start(self) -> None:
        """Watch from here on."""
        for part in (self._sharing, self._capture):  # the capture on top, which sees a call as the model makes it
            if part is not None:
                part.start()

    def stop(self) -> None:
        """The forward is over, well or not."""
        for part in (self._capture, self._sharing):
            if part is not None:
                part.stop()

    def inspect(self, output: Any, kwargs: Mapping[str, Any]) -> None:
        """Find where the output's coefficients can be read, and whether every use of a parameter was seen."""
        find = find_readout if self.layout.packed is None else partial(find_packed_readout, self.layout.packed)
        readout = find(output, kwargs, self.input_ids, temperature=self._config.temperature)
        if isinstance(readout, str):
            self._guard.fail(readout)
            return
        self._readout, self._version = readout, readout.root._version  # noqa: SLF001  (no public name for it)
        has_logits = isinstance(readout, LogitsReadout) or (isinstance(readout, PackedReadout) and readout.mask is None)
        self._logits = readout.root.grad_fn if has_logits else None
        if self._capture is not None:
            obstacle = self._find_obstacle(output, kwargs, readout.root)
            if obstacle is None:
                self._survey(self._capture, readout)
            else:
                self._guard.fail(obstacle)
        if isinstance(readout, ValueReadout) and readout.besides is not None:
            beside = "the loss moves the logits beside the value head"
            handle = readout.besides.register_hook(lambda _: self._guard.break_off(beside))  # type: ignore[no-untyped-call]
            self._handles.append(handle)
        self._handles.append(readout.root.register_hook(self._on_grad))  # type: ignore[no-untyped-call]

    def _find_obstacle(self, output: Any, kwargs: Mapping[str, Any], root: Tensor) -> str | None:
        """Why a gradient of this output may be more than its log-probs', or cannot be told apart by row."""
        bypass = _find_bypass(output)
        if bypass is not None and not self._config.is_trusted:
            return f"the output also holds {bypass}, through which a loss can pass the log-probs by"
        if 1 < self.layout.shape[0] == self.layout.shape[1] and moves_rows(root):
            return "the batch has as many rows as tokens, so that its axes cannot be told apart"
        if kwargs.get("output_router_logits") or getattr(output, "aux_loss", None) is not None:
            return "the loss has a part (the routers' auxiliary loss) that passes the log-probs by"
        return None

    def _survey(self, capture: Capture, readout: Readout | PackedReadout) -> None:
        """Note which uses the backward will reach."""
        if isinstance(readout, (FusedReadout, PackedReadout)) and readout.mask is not None:
            self._watch_fused_head(capture, readout.root, readout.mask)
        survey = capture.survey(readout.root, opaque=True)
        if survey.foreign:
            self._guard.fail(
                f"the loss reaches {survey.foreign}, which is none of the model's own parameters (a wrapper's, as "
                "FSDP 1 has it?), so that these are not seen to receive a gradient"
            )
        if self._fails_for(survey.missed) or survey.foreign:
            return
        self.has_hidden_regions = survey.hidden
        self.expected += [tap for tap in capture.taps if tap.node in survey.reached]
        if survey.hidden or any(not tap.ready for tap in capture.taps):
            # Checkpointed regions are computed again during the backward, where the capture is to see them.
            for module in self._config.model.modules():
                self._handles.append(module.register_forward_pre_hook(self._before_recomputation, prepend=True))
                self._handles.append(module.register_forward_hook(self._after_recomputation, always_call=True))

    def _watch_fused_head(self, capture: Capture, root: Tensor, mask: Tensor) -> None:
        """Record the fused head's weight and bias, which no operator shows, and wait for its output gradient."""
        node = find_fused_head(root)
        if node is None:
            return
        taps = tap_fused_head(node, mask, capture.leaves, capture.parameters)
        capture.taps.extend(taps)

        def arrive(grads: Sequence[Tensor | None]) -> None:
            if any(grad is not None and bool(grad.any()) for grad in grads[1:]):
                self._guard.fail("the loss has a part (the head's entropy) that passes the log-probs by")
            for tap in taps:
                if grads[0] is not None:
                    self._arrive(tap, grads[0])

        self._handles.append(node.register_prehook(lambda grads: self._guard.guarded(arrive, grads)))

    def _before_recomputation(self, module: nn.Module, args: Any) -> None:
        if self._recomputed is None and in_backward() and torch.is_grad_enabled() and self._capture is not None:
            self._recomputed = module
            self._capture.start()

    def _after_recomputation(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._recomputed is module and self._capture is not None:
            self._recomputed = None
            self._capture.stop()
            if self.has_hidden_regions and current_region() is None:  # reentrant: its graph is there only now
                self._guard.guarded(self._survey_region, self._capture, output)

    def _survey_region(self, capture: Capture, output: Any) -> None:
        """Check a reentrant region for uses that no rule accounts for."""
        if isinstance(output, Mapping):
            output = tuple(output.values())
        parts = output if isinstance(output, (tuple, list)) else [output]
        roots = [part for part in parts if isinstance(part, Tensor) and part.grad_fn is not None]
        self._fails_for(frozenset[int]().union(*(capture.survey(root, opaque=True).missed for root in roots)))

    def _fails_for(self, missed: frozenset[int]) -> bool:
        if missed:
            self._guard.fail(f"no rule can tell the rows apart where the model uses {self._config.list_names(missed)}")
        return bool(missed)

    def _on_grad(self, grad: Tensor) -> None:
        wait_for(grad.device)
        self._guard.guarded(self._read, grad)

    def _read(self, grad: Tensor) -> None:
        """Read the coefficients off the output's gradient, and collect what has arrived before them."""
        if self.is_read:
            self._guard.fail("two backward passes went through one forward")
            return
        assert self._readout is not None
        if self._readout.root._version != self._version:  # noqa: SLF001  (as above)
            self.is_read = True
            self._guard.break_off("the model's output was changed in place after the forward")
            return
        with torch.no_grad():
            coefficients = self._readout.read(grad)
        destination = self._on_coefficients(self, coefficients)
        self.is_read = True
        self._readout = None  # the logits need not outlive the backward's first step
        queue, self._queue = self._queue, []
        if destination is None:
            return
        self._note_spans(coefficients.marks)
        inverses = [split_factor(1 / c if c else 0.0) for c in coefficients.c.tolist()]
        self._powers, self.remainders = [power for power, _ in inverses], [remainder for _, remainder in inverses]
        self._place, self._collector = destination
        for tap, grad_output in queue:
            self._arrive(tap, grad_output)

    def _expect_late(self, tap: Tap) -> None:
        """Wait for a use that a reentrant region shows only while it is computed again."""
        if self._place is not None and self._collector is not None:
            self._collector.expect(tap, self._place)

    def _arrive(self, tap: Tap, grad_output: Tensor) -> None:
        self._guard.guarded(self._collect, tap, grad_output)

    def _collect(self, tap: Tap, grad_output: Tensor) -> None:
        """Hand a use's output gradient on, with the factors that turn it into that of the log-probs."""
        self.is_half |= grad_output.dtype == torch.float16
        if self._guard.no_entries_reason is not None:
            return
        if self._place is None or self._collector is None:
            self._queue.append((tap, grad_output))
            return
        param = tap.use.view.param
        if param in self._collector.ledger.entries:
            self._guard.fail(f"{self._config.names[param]} is used in more than one reentrant checkpoint")
            return
        look = partial(self._find_spans, tap, grad_output)
        certain = is_synchronous(grad_output.device)
        layout = replace(self.layout, look=look, certain=certain)
        self._collector.arrive(tap, grad_output, Place(layout, self._place.rows), self._powers)

    def _note_spans(self, marks: Tensor) -> None:
        """Note where each row's output gradients can be other than zero, from marked tokens, bool `[N, L]`."""
        length = self.layout.length
        first, after = marks.int().argmax(1).tolist(), (length - marks.flip(1).int().argmax(1)).tolist()
        # A token is predicted at the position before it. Above the head's output there is nothing but these.
        self._spans = {False: [(0, stop) for stop in after]}
        self._spans[True] = [(max(0, start - 1), stop) for start, stop in zip(first, after, strict=True)]
        for is_logits, spans in self._spans.items():  # positions of all tokens, flattened, int64
            inside = torch.zeros(math.prod(self.layout.shape), dtype=torch.bool)
            for begin, (start, stop) in zip(self.layout.starts, spans, strict=True):
                inside[begin + start : begin + stop] = True
            self._outside[is_logits] = (~inside).nonzero()[:, 0]

    def _find_spans(self, tap: Tap, grad_output: Tensor) -> list[tuple[int, int]] | None:
        """Each row's `(start, stop)` outside of which an output gradient is zero; None where that is not so."""
        layout = self.layout  # right for a causal model, which is not checked here
        if grad_output.shape[:-1].numel() != math.prod(layout.shape) or not grad_output.is_contiguous():
            return None
        is_logits = tap.node is self._logits
        positions = grad_output.flatten(0, -2)
        step = max(1, at_once(grad_output.device) // (positions.shape[1] * positions.element_size()))
        outside = self._outside[is_logits] = self._outside[is_logits].to(grad_output.device)
        for part in torch.split(outside, step) if len(outside) else ():
            lowest, highest = positions.index_select(0, part).aminmax()
            if not is_synchronous(grad_output.device):
                self.padding_gradients.append(torch.maximum(lowest.abs(), highest.abs()).float())
            elif float(lowest) != 0 or float(highest) != 0:
                return None
        return self._spans[is_logits]

    def close(self) -> None:
        """Let go of the graph and take off every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._queue.clear()
        self.expected.clear()
        self._readout = self._logits = None
        if self._capture is not None:
            self._capture.close()


def is_synchronous(device: torch.device) -> bool:
    """Whether values can be looked at as they come; elsewhere work is queued, and a look would wait for all of it."""
    return device.type == "cpu"


def _find_bypass(output: Any) -> str | None:
    """A part of the output, besides the log-probs and what is made of them, by which a gradient can enter the model."""
    for name, value in output.items() if isinstance(output, Mapping) else ():
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if name not in _KNOWN_OUTPUTS and any(isinstance(part, Tensor) and part.requires_grad for part in parts):
            return str(name)
    return None
