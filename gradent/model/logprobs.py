"""Summed completion log-probs from a model's logits, without a second `[R, L, V]` float tensor.

Letters: R rows, L tokens, V vocabulary, P completion tokens over all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradent.errors import NonFiniteError
from gradent.kernels.common.numerics import accumulator

__all__ = ["check_logps", "check_rows", "sequence_logprobs"]

TILE = 64 * 2**20
"""Bytes of the float tile in which the softmax is formed, a few tokens at a time, unless told otherwise."""

CACHED = 2 * 2**20
"""The same on a CPU, where a tile that has left the caches is read from memory at every step."""

# Nodes that do not keep their own result for the backward pass: the logits they return may be overwritten by their
# gradient. Anything else (tanh of a soft cap, say) gets a tensor of its own.
_FORGETFUL = {f"{name}Backward0" for name in ("UnsafeView", "Mm", "Addmm", "Linear", "Mul", "Div", "Add", "ToCopy")}


# The softmax is taken in float32 (float64 for float64 logits) whatever the logits' dtype, in tiles. In the backward the
# logits' memory is reused for their gradient where the model has no more need of them.
def sequence_logprobs(logits: Tensor, input_ids: Tensor, completion_mask: Tensor, *, tile: int = TILE) -> Tensor:
    """`log π(y|x)` of every row, float64 `[R]`, from logits `[R, L, V]`, ids and marks (or weights) of y `[R, L]`."""
    if logits.device.type == "cpu":
        tile = min(tile, CACHED)
    result: Tensor = _SequenceLogProbs.apply(logits, input_ids, completion_mask, tile)  # type: ignore[no-untyped-call]
    return result


class _SequenceLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, input_ids: Tensor, completion_mask: Tensor, tile: int) -> Tensor:
        wide, marks, targets = accumulator(logits.dtype), completion_mask[:, 1:], input_ids[:, 1:]
        ctx.spans = _spans(marks, logits.shape[-1] * wide.itemsize, tile)
        normalizer = torch.zeros(marks.shape, dtype=wide, device=logits.device)
        total = torch.zeros(logits.shape[0], dtype=torch.float64, device=logits.device)
        for row, span, _ in ctx.spans:
            scores = logits[row, span].to(wide)
            normalizer[row, span] = scores.logsumexp(-1)
            chosen = scores.gather(1, targets[row, span, None])[:, 0] - normalizer[row, span]
            total[row] += (chosen.where(marks[row, span] != 0, 0).double() * marks[row, span]).sum()
        is_view = logits._is_view()  # noqa: SLF001  (torch has no public name for it)
        ctx.reuse = not is_view and logits.grad_fn is not None and logits.grad_fn.name() in _FORGETFUL
        ctx.save_for_backward(logits, targets, marks, normalizer)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        logits, targets, marks, normalizer = ctx.saved_tensors
        # detach() shares the version counter: should a node below keep the logits after all, autograd says so.
        grad = logits.detach() if ctx.reuse else torch.zeros_like(logits)
        scales = (grads[0][:, None] * marks).to(normalizer.dtype)
        done = [0] * len(grad)
        for row, span, is_marked in ctx.spans:
            scale, target = scales[row, span, None], grad[row, span]
            part = target if target.dtype == normalizer.dtype else torch.empty_like(target, dtype=normalizer.dtype)
            torch.sub(logits[row, span], normalizer[row, span, None], out=part)
            part.exp_().mul_(-scale).scatter_add_(1, targets[row, span, None], scale)
            if not is_marked:
                part.masked_fill_(marks[row, span, None] == 0, 0)
            if part is not target:
                target.copy_(part)
            grad[row, done[row] : span.start] = 0
            done[row] = span.stop
        for row, start in enumerate(done):
            grad[row, start:] = 0
        return grad, None, None, None


def _spans(marks: Tensor, width: int, tile: int) -> list[tuple[int, slice, bool]]:
    """`(row, positions, whether all are marked)`: every row from its first to its last mark, a tile each."""
    step = max(1, tile // width)
    spans = []
    for row, marked in enumerate(marks.tolist()):
        places = [place for place, mark in enumerate(marked) if mark]
        for start in range(places[0], places[-1] + 1, step) if places else ():
            span = slice(start, min(places[-1] + 1, start + step))
            spans.append((row, span, all(marked[span])))
    return spans


def check_logps(logps: Tensor, pairs: Sequence[int], chosen: Sequence[bool]) -> None:
    """Refuse non-finite log-probs `[R]`, naming the first row by its pair and side."""
    sides = zip(pairs, chosen, strict=True)
    check_rows(logps, [f"pair {pair}, {'chosen' if is_chosen else 'rejected'}" for pair, is_chosen in sides])


def check_rows(logps: Tensor, names: Sequence[str]) -> None:
    """Refuse non-finite log-probs `[R]` of rows with these names."""
    logps = logps.detach()
    bad = (~torch.isfinite(logps)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise NonFiniteError(
            f"non-finite logits: {names[row]}: the log-prob is {float(logps[row])}. The model's forward pass overflows "
            "or divides by zero on this row: try a wider dtype (bfloat16 or float32 instead of float16), or check the "
            "checkpoint for nan."
        )
