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
from gradent.hooks.uses.packed_rows import find_packed_rows
from gradent.model.observed import is_observed

__all__ = ["Piggyback"]


class Piggyback:
    """Watches a model's forwards, and the backwards through them; `clock` counts the time that this takes."""

    def __init__(self, config: WatchConfig) -> None:
        self.clock = Clock()
        self._config = config
        self._trainable = {id(parameter) for parameter in config.tensors}
        self._handles: list[RemovableHandle] = []
        self._running: WatchedForward | None = None
        self._backwards: list[WatchedBackward] = []
        self._numbers = count(current_rank() << 20)  # of backwards, of which no two ranks have the same

    def arm(self) -> None:
        """Watch from now on."""
        if not self._handles:
            model = self._config.model
            self._handles = [
                model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
                model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def disarm(self) -> None:
        """Take every hook off the model and let go of every graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._running is not None:
            self._running.stop()
            self._running = None
        for backward in self._backwards:
            backward.close()
        self._backwards.clear()

    def take(self) -> list[BackwardObservation]:
        """What the backwards since the last call showed; their graphs are let go of."""
        backwards, self._backwards = self._backwards, []
        observations = [(backward, backward.finish()) for backward in backwards]
        return [seen for backward, seen in observations if backward.has_started or seen.unusable_reason is not None]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_own = self._running is not None or is_observed(self._config.model)
        if is_own or not torch.is_grad_enabled() or in_backward():
            return
        try:
            self._start_forward(args, kwargs)
        except Exception as error:  # noqa: BLE001  (an error here would end the trainer's forward)
            self._abandon(f"gradent's own {type(error).__name__}: {error}")

    def _abandon(self, reason: str) -> None:
        """Keep why a forward cannot be watched."""
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
        # Copies: a loop may well change its batch in place before the backward.
        forward = self._backwards[-1].make_forward(input_ids.detach().clone(), mask.detach().clone(), packed)
        self._backwards[-1].observation.packed_call = call
        forward.start()
        self._running = forward

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward, self._running = self._running, None
        if forward is None:
            return
        forward.stop()
        if output is None:  # the forward raised
            forward.close()
        else:
            self._backwards[-1].add_forward(forward, output, kwargs)
