"""Reading Gram entries off a trainer's own backward: no extra forward, no extra backward.

While armed, every forward that builds a graph is captured (`capture.py`), and its output is watched for the
coefficients `c_i` (`readout.py`). The backward then brings each use's cotangent, `c_i` times the one that a measurement
needs; `c_i` is divided out of a factor before any product is formed. Nothing is written to the model, to `.grad` or to
a random state, so the run is the same to the bit; what goes wrong here is kept as a `problem`, never raised into the
trainer's pass.

Letters: N rows of a forward, k pairs, rows 0..k-1 chosen and k..2k-1 rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradent.hooks.capture.checkpointing import in_backward
from gradent.hooks.overhead import Clock
from gradent.hooks.piggyback.backward import Passed, WatchedBackward, Watching
from gradent.hooks.piggyback.forward import WatchedForward
from gradent.hooks.piggyback.pairing import Pairing
from gradent.model.calls import is_observed
from gradent.model.sharding import find_owners

__all__ = ["Passed", "Piggyback"]


class Piggyback:
    """Watches a model's forwards, and the backwards through them.

    Args:
        model: the model that the trainer calls, unwrapped.
        parameters: all its trainable parameters by name; their numbers are their places here.
        budget: bytes that the reductions' tiles may take.
        pairing: which rows of a forward are chosen, which rejected.
        weight: parameter number -> square root of the metric's diagonal, or None.
        entries: capture uses too; without, only coefficients are read.
        trusted: the loss sees log-probs alone, whatever else the model is asked for.
        share: give the trainer's backward the weight gradients that the measured products add up to (`share.py`).

    Attributes:
        clock: the time spent on watching.
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
        trusted: bool = False,
        share: bool = False,
    ) -> None:
        tensors = list(parameters.values())
        self.clock = Clock()
        self._watching = Watching(
            model=model,
            names=list(parameters),
            parameters=tensors,
            sharded=find_owners(model, tensors),
            budget=budget,
            pairing=pairing,
            weight=weight,
            entries=entries,
            trusted=trusted,
            share=share and entries,
            clock=self.clock,
        )
        self._model = model
        self._trainable = {id(parameter) for parameter in tensors}
        self._handles: list[RemovableHandle] = []
        self._running: WatchedForward | None = None
        self._groups: list[WatchedBackward] = []

    def arm(self) -> None:
        """Watch from now on."""
        if not self._handles:
            self._handles = [
                self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
                self._model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
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
        if not torch.is_grad_enabled() or in_backward() or self._running is not None or is_observed(self._model):
            return
        try:
            self._enter(args, kwargs)
        except Exception as error:  # noqa: BLE001  (an error here would end the trainer's forward)
            self._break(f"gradent's own {type(error).__name__}: {error}")

    def _break(self, why: str) -> None:
        """Keep that a forward cannot be watched, and why."""
        group = WatchedBackward(self._watching)
        group.passed.broken, group.started = why, True
        self._groups.append(group)

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids")
        if input_ids is None:
            input_ids = next((arg for arg in args if isinstance(arg, Tensor)), None)
        for group in self._groups:
            if group.started:  # its backward is over: its graph need not wait for `take`
                group.finish()
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            self._break("the model was called without input_ids [N, L]")
            return
        if {id(p) for p in self._model.parameters() if p.requires_grad} != self._trainable:
            self._break("other parameters are trainable than when the watching began; arm again")
            return
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
            mask = torch.ones_like(input_ids)
        if not self._groups or self._groups[-1].started:
            self._groups.append(WatchedBackward(self._watching))
        # Copies: a loop may well change its batch in place before the backward.
        forward = WatchedForward(self._groups[-1], input_ids.detach().clone(), mask.detach().clone())
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
