"""Reading Gram entries off a trainer's own backward: no extra forward, no extra backward.

1. A forward pre-hook starts a `WatchedForward`: a capture of every use of a trainable parameter (`capture/`).
2. The forward hook inspects the output and registers a hook where its coefficients `c_i` can be read.
3. The backward reaches the output: the coefficients are read (`coefficients.py`), and the `WatchedBackward` settles
   which row is chosen and which rejected, or that rows are no pairs. Each use's output gradient follows. It is `c_i`
   times the one that a measurement needs, so `1 / c_i` is multiplied into a factor before any product is formed.
4. `take` turns each backward into a `BackwardObservation`, and lets go of its graph.

Nothing is written to the model, to `.grad` or to a random state, so the run is the same to the bit. An error here is
kept as a reason (`guard.py`), and never raised into the trainer's pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradent.distributed import current_rank
from gradent.hooks.capture.checkpointing import in_backward
from gradent.hooks.overhead import Clock
from gradent.hooks.piggyback.backward import WatchedBackward
from gradent.hooks.piggyback.config import WatchConfig
from gradent.hooks.piggyback.forward import WatchedForward
from gradent.hooks.piggyback.observation import BackwardObservation
from gradent.hooks.piggyback.packed import PackedCall
from gradent.hooks.uses.packed_rows import PACKING, find_packed_rows
from gradent.model.inputs import find_further_inputs
from gradent.model.observed import is_observed
from gradent.model.sharding import REPLICAS, is_sharded
from gradent.model.weight_mark import WeightMark

__all__ = ["Piggyback"]


class Piggyback:
    """Watches a model's forwards, and the backwards through them; `clock` counts the time that this takes."""

    def __init__(self, config: WatchConfig) -> None:
        self.clock = Clock()
        self._config = config
        self._trainable = {id(parameter) for parameter in config.tensors}
        self._handles: list[RemovableHandle] = []
        self._call: Callable[..., Any] | None = None  # a model's compiled call, which stands in for its hooks
        self._running: WatchedForward | None = None
        self._thread = 0  # that it runs in
        self._current: WatchedBackward | None = None  # that it belongs to
        self._is_sharded = is_sharded(config.model)
        self.forwards = 0  # of the model, with gradients, since it was armed
        self._backwards: list[WatchedBackward] = []
        self._numbers = count(current_rank() << 20)  # of backwards, of which no two ranks have the same

    def arm(self) -> None:
        """Watch from now on."""
        model = self._config.model
        if self._handles or self._call is not None:
            return
        if model._compiled_call_impl is not None:  # noqa: SLF001  (hooks would be traced: what is compiled has them)
            self._call = model._compiled_call_impl  # noqa: SLF001
            model._compiled_call_impl = self._run_compiled  # noqa: SLF001
        else:
            self._handles = [
                model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
                model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def _run_compiled(self, *args: Any, **kwargs: Any) -> Any:
        """A model's compiled call (`model.compile()`) between what the hooks do."""
        assert self._call is not None
        model, output = self._config.model, None
        self._before(model, args, kwargs)
        try:
            output = self._call(*args, **kwargs)
        finally:
            self._after(model, args, kwargs, output)
        return output

    def disarm(self) -> None:
        """Take every hook off the model and let go of every graph."""
        if self._call is not None:
            self._config.model._compiled_call_impl = self._call  # noqa: SLF001
            self._call = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._running is not None:
            self._running.stop()
            self._running = self._current = None
        for backward in self._backwards:
            backward.close()
        self._backwards.clear()

    def take(self) -> list[BackwardObservation]:
        """What the backwards since the last call showed; their graphs are let go of."""
        backwards, self._backwards = self._backwards, []
        observations = [(backward, backward.finish()) for backward in backwards]
        return [seen for backward, seen in observations if backward.has_started or seen.unusable_reason is not None]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_observed(self._config.model) or not torch.is_grad_enabled() or in_backward():
            return
        if module is not self._config.model:  # a copy, which shares the model's hooks and runs in another thread
            self._abandon(REPLICAS)
            return
        if self._running is not None:
            if threading.get_ident() != self._thread:
                self._abandon("several threads run the model at the same time")
            return
        try:
            self._start_forward(args, kwargs)
        except Exception as error:  # noqa: BLE001  (an error here would end the trainer's forward)
            self._abandon(f"gradent's own {type(error).__name__}: {error}")

    def _abandon(self, reason: str) -> None:
        """Keep why a forward cannot be watched."""
        self.forwards += 1
        self._backwards.append(WatchedBackward(self._config, self.clock, next(self._numbers)))
        self._backwards[-1].abandon(reason)

    def _start_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids")
        if input_ids is None:
            input_ids = next((arg for arg in args if isinstance(arg, Tensor)), None)
        for backward in self._backwards:
            if backward.has_started:  # it is over by now: its graph need not wait for `take`
                backward.finish()
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            self._abandon("the model was called without input_ids [N, L]")
            return
        if {id(p) for p in self._config.model.parameters() if p.requires_grad} != self._trainable:
            self._abandon("other parameters are trainable than when the watching began; arm again")
            return
        packed = find_packed_rows(input_ids, kwargs)
        mask, call = kwargs.get("attention_mask"), None
        if packed is not None:
            call = PackedCall(self._config.model, args, kwargs, input_ids.detach().clone(), packed)
            mask, input_ids = packed.mask(input_ids.device).long(), packed.unpack(input_ids, 1)
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            mask = torch.ones_like(input_ids)
        if not self._backwards or self._backwards[-1].has_started:
            self._backwards.append(WatchedBackward(self._config, self.clock, next(self._numbers)))
            if not self._is_sharded:
                self._backwards[-1].observation.weights = WeightMark(self._config.tensors)
        # Copies: a loop may well change its batch in place before the backward.
        named = kwargs if packed is None else {name: kwargs[name] for name in kwargs.keys() - PACKING}
        inputs = find_further_inputs(self._config.model, args, named, input_ids, mask)
        self._current = self._backwards[-1]
        forward = self._current.make_forward(input_ids.detach().clone(), mask.detach().clone(), inputs, packed)
        self._current.observation.packed_call = call
        forward.start()
        self.forwards += 1
        self._running, self._thread = forward, threading.get_ident()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward = self._running
        if forward is None or module is not self._config.model or threading.get_ident() != self._thread:
            return
        self._running, backward, self._current = None, self._current, None
        forward.stop()
        if output is None or backward is None:  # the forward raised
            forward.close()
        else:
            backward.add_forward(forward, output, kwargs)
