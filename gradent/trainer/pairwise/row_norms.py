"""The norms of every response's gradient, read off a trainer's own forward before its backward runs.

The forward is watched as `hooks.piggyback` watches it. One backward from the log-probs then runs down to the lowest
layers and stops there: it forms no weight gradient, writes to no `.grad` and keeps the graph, so that the trainer's own
backward can follow. Where a parameter's uses cannot be told apart by row, one backward a response does it instead.

Letters: N = 2B rows of the forward, rows 0..B-1 chosen and B..2B-1 rejected; K predicted tokens a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from gradent.errors import GradentWarning, InputError, ModelError, NonFiniteError
from gradent.hooks.capture.coverage import Edge, survey
from gradent.hooks.overhead import Clock
from gradent.hooks.piggyback.backward import WatchedBackward, Watching, addressed_to
from gradent.hooks.piggyback.forward import WatchedForward
from gradent.kernels.common.budget import DEFAULT_BUDGET
from gradent.kernels.common.numerics import accumulator, reduce_flat
from gradent.losses.base import describe_pairs

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
    """A model for one forward of a loss that sees its log-probs alone.

    Called in the model's place, it runs the model and gives its output with the log-probs cut off from the model: a
    loss that is made of them can be differentiated by the log-probs alone. The log-probs with their graph are `root`.

    Args:
        model: what the loss would call.
        inner: the model itself, without the wrappers of a distributed run.
        parameters: its trainable parameters by name.
        budget: bytes that the reductions' tiles may take; None for the default.

    Attributes:
        root: per-token log-probs `[N, K]`, with their graph.
        leaf: the same numbers without it, of which the loss was made.
        mask: the tokens that they are over, bool `[N, K]`.
        aux_loss: the routers' auxiliary loss with its graph; None where there is none.
    """

    root: Tensor
    leaf: Tensor
    mask: Tensor
    aux_loss: Tensor | None = None

    def __init__(
        self, model: nn.Module, inner: nn.Module, parameters: Mapping[str, Tensor], *, budget: int | None
    ) -> None:
        self._model, self._inner = model, inner
        self._parameters = list(parameters.values())
        self._group = WatchedBackward(
            Watching(
                model=inner,
                names=list(parameters),
                parameters=self._parameters,
                sharded={},
                budget=budget or DEFAULT_BUDGET,
                pairing="halves",
                weight=None,
                entries=True,
                trusted=True,
                share=False,
                clock=Clock(),
            )
        )

    def __getattr__(self, name: str) -> Any:
        """Whatever else the loss asks of the model."""
        return getattr(self._model, name)

    def __call__(self, **kwargs: Any) -> Any:
        """Run the model, once.

        Args:
            kwargs: what the loss calls the model with.

        Returns:
            Its output, the log-probs cut off from the model.

        Raises:
            ModelError: the loss calls the model a second time, or the output holds no log-probs.
        """
        if self._group.forwards:
            raise ModelError("the loss calls the model twice for one batch; its log-probs must come of one forward.")
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
        forward = WatchedForward(self._group, ids.detach(), mask.detach())
        forward.enter()
        try:
            output = self._model(**kwargs)
        except BaseException:
            forward.close()
            raise
        finally:
            forward.leave()
        self._group.forwards.append(forward)
        root, marks = getattr(output, "log_probs", None), getattr(output, "label_mask", None)
        if not isinstance(root, Tensor) or not isinstance(marks, Tensor) or marks.shape != root.shape:
            raise ModelError(
                f"the model returned {type(output).__name__} without log_probs and the mask of their tokens "
                "(label_mask); accepted is a model under TRL's fused head, as TRL 1.15 or newer sets up."
            )
        self._group.guarded(forward.see, output, kwargs)
        self.root, self.mask = root, marks.bool()
        self.aux_loss = getattr(output, "aux_loss", None)
        self.leaf = output.log_probs = root.detach().requires_grad_()
        return output

    def norms(self, announced: set[str]) -> RowNorms:
        """Measure; the graph stays for one more backward.

        Args:
            announced: what was said already; a fallback is added to it when it is announced.

        Returns:
            The norms.

        Raises:
            InputError: reentrant gradient checkpointing.
            ModelError: memory ran out.
            NonFiniteError: a norm is nan or infinite.
        """
        group = self._group
        if group.hidden:
            raise InputError(
                "Reentrant gradient checkpointing hides the layers inside it from pairwise normalization. Use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or switch checkpointing off."
            )
        device = self.root.device.type
        with torch.autocast(device, enabled=False):  # as the trainer's backward, which runs outside of autocast
            if group.passed.problem is None:
                with addressed_to(group):
                    self._differentiate(_bottoms(self.root, group))
                group.finish()
            passed = group.passed
            if passed.broken is not None and "memory" in passed.broken:
                raise ModelError(f"pairwise normalization: {passed.broken}.")
            if passed.problem is None and passed.broken is None:
                some = torch.zeros(len(self.root) // 2, 3, dtype=torch.float64)
                entries = sum((entry.cpu() for entry in passed.entries.values()), some)
            else:
                _announce(passed.problem or str(passed.broken), announced)
                with addressed_to(None):
                    entries = self._row_by_row()
        chosen_sq, rejected_sq, inner = entries.unbind(1)
        bad = ~entries.isfinite().all(1)
        if bool(bad.any()):
            raise NonFiniteError(
                f"pairwise normalization: a gradient's norm is nan or inf for {describe_pairs(bad)} of the batch. Look "
                "for a nan in the model's logits on them; under fp16, train in bf16 or float32 instead."
            )
        return RowNorms(chosen_sq.clamp_min(0).sqrt(), rejected_sq.clamp_min(0).sqrt(), inner)

    def _differentiate(self, inputs: list[Any], rows: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of `Σ log π` over the masked tokens (of some rows), at `inputs`."""
        cotangent = self.mask.to(self.root.dtype)
        if rows is not None:
            cotangent = cotangent * rows.to(cotangent)[:, None]
        if not inputs:
            return ()
        return torch.autograd.grad(self.root, inputs, cotangent, retain_graph=True, allow_unused=True)

    def _row_by_row(self) -> Tensor:
        """Entries `[B, 3]` from one backward a response, two gradients in memory at once."""
        pairs = len(self.root) // 2
        entries = torch.zeros(pairs, 3, dtype=torch.float64)
        rows = torch.eye(2 * pairs)
        for pair in range(pairs):
            sides = [self._differentiate(self._parameters, rows[row]) for row in (pair, pairs + pair)]
            for parameter, grads in zip(self._parameters, zip(*sides, strict=True), strict=True):
                wide = [torch.zeros_like(parameter) if grad is None else grad for grad in grads]
                flat = torch.stack([grad.flatten().to(accumulator(grad.dtype)) for grad in wide])
                entries[pair] += reduce_flat(flat).cpu()
        return entries

    def close(self) -> None:
        """Take every hook off the graph and the model."""
        self._group.close()


def _bottoms(root: Tensor, group: WatchedBackward) -> list[GradientEdge]:
    """Where a backward may stop that is to run through every recorded use."""
    claimed: dict[Edge, frozenset[Node]] = {}
    for _, tap in group.expected:
        for edge in tap.edges:
            claimed[edge] = claimed.get(edge, frozenset()) | {tap.node}
    uses = frozenset(tap.node for _, tap in group.expected)
    assert root.grad_fn is not None
    return survey(root.grad_fn, claimed, uses, {}, opaque=True).bottoms


def _announce(reason: str, announced: set[str]) -> None:
    if "row by row" not in announced:
        announced.add("row by row")
        warnings.warn(
            f"pairwise normalization takes one backward a response (as exact, but slow): {reason}.",
            GradentWarning,
            stacklevel=2,
        )
