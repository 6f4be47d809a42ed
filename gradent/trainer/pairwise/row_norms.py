"""The norms of every response's gradient, read off a trainer's own forward before its backward runs.

The forward is watched as `hooks.piggyback` watches it. One backward from the log-probs then runs down to the lowest
layers and stops there: it forms no weight gradient, writes to no `.grad` and keeps the graph, so that the trainer's own
backward can follow. Where a parameter's uses cannot be told apart by row, one backward a response does it instead.

Letters: N = 2B rows of the forward, rows 0..B-1 chosen and B..2B-1 rejected; K predicted tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradent.errors import InputError, ModelError, NonFiniteError
from gradent.hooks.capture.coverage import survey
from gradent.hooks.overhead import Clock
from gradent.hooks.piggyback.backward import WatchedBackward
from gradent.hooks.piggyback.config import WatchConfig
from gradent.hooks.piggyback.guard import private_backward
from gradent.kernels.common.numerics import accumulator, reduce_flat
from gradent.losses.base import describe_pairs
from gradent.notices import Notices

__all__ = ["RowNorms", "WatchedModel"]


@dataclass(frozen=True)
class RowNorms:
    """`‖g_w‖`, `‖g_l‖` and `⟨g_w, g_l⟩` of B pairs, float64 `[B]` on the CPU."""

    chosen: Tensor
    rejected: Tensor
    inner: Tensor

    @property
    def cosine(self) -> Tensor:
        """`⟨g_w, g_l⟩ / (‖g_w‖‖g_l‖)`; nan where a norm is zero."""
        return self.inner / (self.chosen * self.rejected)


class WatchedModel:
    """A model for one forward of a loss that sees its log-probs alone, and can be differentiated by them alone."""

    root: Tensor  # per-token log-probs `[N, K]`, with their graph
    leaf: Tensor  # the same numbers without it, of which the loss was made
    mask: Tensor  # the tokens that they are over, bool `[N, K]`
    aux_loss: Tensor | None = None  # the routers' auxiliary loss with its graph; None without one

    def __init__(self, model: nn.Module, config: WatchConfig) -> None:
        self._model, self._config = model, config
        self._backward = WatchedBackward(config, Clock())

    def __getattr__(self, name: str) -> Any:
        """Whatever else the loss asks of the model."""
        return getattr(self._model, name)

    def __call__(self, **kwargs: Any) -> Any:
        """Run the model, once; its output's log-probs come cut off from the model."""
        if self._backward.forwards:
            raise ModelError("the loss calls the model twice for one batch; its log-probs must come of one forward.")
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
        forward = self._backward.make_forward(ids.detach(), mask.detach())
        forward.start()
        try:
            output = self._model(**kwargs)
        except BaseException:
            forward.close()
            raise
        finally:
            forward.stop()
        root, marks = getattr(output, "log_probs", None), getattr(output, "label_mask", None)
        if not isinstance(root, Tensor) or not isinstance(marks, Tensor) or marks.shape != root.shape:
            raise ModelError(
                f"the model returned {type(output).__name__} without log_probs and the mask of their tokens "
                "(label_mask); accepted is a model under TRL's fused head, as TRL 1.15 or newer sets up."
            )
        self._backward.add_forward(forward, output, kwargs)
        self.root, self.mask = root, marks.bool()
        self.aux_loss = getattr(output, "aux_loss", None)
        self.leaf = output.log_probs = root.detach().requires_grad_()
        return output

    def measure(self, notices: Notices) -> RowNorms:
        """The norms; a slow way is announced through `notices`, and the graph stays for one more backward."""
        if any(forward.has_hidden_regions for forward in self._backward.forwards):
            raise InputError(
                "Reentrant gradient checkpointing hides the layers inside it from pairwise normalization. Use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or switch checkpointing off."
            )
        # As the trainer's backward, which runs outside of autocast.
        with torch.autocast(self.root.device.type, enabled=False):
            entries = self._read_entries(notices)
        chosen_sq, rejected_sq, inner = entries.unbind(1)
        bad = ~entries.isfinite().all(1)
        if bool(bad.any()):
            raise NonFiniteError(
                f"pairwise normalization: a gradient's norm is nan or inf for {describe_pairs(bad)} of the batch. Look "
                "for a nan in the model's logits on them; under fp16, train in bf16 or float32 instead."
            )
        return RowNorms(chosen_sq.clamp_min(0).sqrt(), rejected_sq.clamp_min(0).sqrt(), inner)

    def _read_entries(self, notices: Notices) -> Tensor:
        """Entries `[B, 3]`: all responses in one backward, or one backward each."""
        guard = self._backward.guard
        if guard.no_entries_reason is None:
            with private_backward(guard):
                taps = [tap for forward in self._backward.forwards for tap in forward.expected]
                self._differentiate(survey(self.root, taps, {}, opaque=True).bottoms)
        observation = self._backward.finish()
        if observation.unusable_reason is not None and "memory" in observation.unusable_reason:
            raise ModelError(f"pairwise normalization: {observation.unusable_reason}.")
        reason = observation.no_entries_reason
        if reason is None:
            zeros = torch.zeros(len(self.root) // 2, 3, dtype=torch.float64)
            return sum((entry.cpu() for entry in observation.pair_entries().values()), zeros)
        notices.once(
            f"pairwise normalization takes one backward a response (as exact, but slow): {reason}.", key="row by row"
        )
        with private_backward(None):
            return self._measure_row_by_row()

    def _differentiate(self, inputs: list[Any], rows: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of `Σ log π` over the masked tokens (of some rows), at `inputs`."""
        if not inputs:
            return ()
        grad_output = self.mask.to(self.root.dtype)
        if rows is not None:
            grad_output = grad_output * rows.to(grad_output)[:, None]
        return torch.autograd.grad(self.root, inputs, grad_output, retain_graph=True, allow_unused=True)

    def _measure_row_by_row(self) -> Tensor:
        """Entries `[B, 3]` from one backward a response, two gradients in memory at once."""
        pairs, parameters = len(self.root) // 2, self._config.tensors
        entries = torch.zeros(pairs, 3, dtype=torch.float64)
        rows = torch.eye(2 * pairs)
        for pair in range(pairs):
            sides = [self._differentiate(parameters, rows[row]) for row in (pair, pairs + pair)]
            for parameter, grads in zip(parameters, zip(*sides, strict=True), strict=True):
                filled = [torch.zeros_like(parameter) if grad is None else grad for grad in grads]
                flat = torch.stack([grad.flatten().to(accumulator(grad.dtype)) for grad in filled])
                entries[pair] += reduce_flat(flat).cpu()
        return entries

    def close(self) -> None:
        """Take every hook off the graph and the model."""
        self._backward.close()
