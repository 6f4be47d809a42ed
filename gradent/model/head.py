"""What enters a model's head, and what leaves it, at the positions that predict a response.

Letters: R rows, L tokens of a row, T tokens of its response, d the width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradent.errors import ModelError
from gradent.kernels.common.numerics import accumulator
from gradent.model.calls import forward_marked
from gradent.model.parameters import output_embeddings

__all__ = ["HeadPass", "Slope", "forward_head", "forward_heads"]

Slope = Tensor | float
"""`∂ logit / ∂ head output` of each entry: 1 where the head's output is the logits."""


class HeadPass(NamedTuple):
    """Of a row's T response tokens: last hidden states `[T, d]`, the logits made of them `[T, V]`, token ids `[T]`."""

    hidden: Tensor
    logits: Tensor
    ids: Tensor
    slope: Slope = 1.0  # `[T, V]`, or one number for all

    def errors(self, span: slice = slice(None)) -> Tensor:
        """`e_y − softmax(logits)` of some tokens, `[t, V]`, float32 or float64: a log-prob's gradient by the logits."""
        wide = self.logits[span].to(accumulator(self.logits.dtype))
        errors = wide.softmax(-1).neg_()
        targets = self.ids[span][:, None]
        return errors.scatter_add_(1, targets, torch.ones_like(targets, dtype=errors.dtype))


@torch.no_grad()
def forward_head(model: nn.Module, ids: Tensor, marks: Tensor, *, trim: bool) -> HeadPass | None:
    """The head of one row, ids and marks `[L]`, in one forward; None where the model does not show its head's input."""
    found = forward_heads(model, ids[None], marks[None], trim=trim)
    return None if found is None else found[0]


@torch.no_grad()
def forward_heads(
    model: nn.Module, ids: Tensor, marks: Tensor, *, trim: bool, slopes: bool = False
) -> list[HeadPass] | None:
    """The head of right-padded rows `[R, L]` in one forward, or None; `slopes` looks at what becomes of its output."""
    head = output_embeddings(model)
    if head is None:
        return None
    seen: list[Any] = []
    made: list[Any] = []

    def look(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.extend(args[:1])
        if slopes and isinstance(output, Tensor):
            made.append((output, output._version))  # noqa: SLF001  (torch has no public name for it)

    handle = head.register_forward_hook(look)
    try:
        logits, kept_ids, kept_marks = forward_marked(model, ids, marks, trim=trim)
    finally:
        handle.remove()
    count = logits.shape[1]
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() != 3 or seen[0].shape[1] < count:
        return None
    hidden = seen[0][:, -count:]
    # The head's own output, or a view of it, that nothing has written to since, needs no second look.
    is_plain = not slopes or (
        len(made) == 1
        and made[0][0]._version == made[0][1]  # noqa: SLF001
        and made[0][0].untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    )
    found = []
    for row, (row_ids, row_marks) in enumerate(zip(kept_ids, kept_marks, strict=True)):
        places = row_marks[1:].bool().nonzero()[:, 0]
        scores = logits[row, places]
        slope = 1.0 if is_plain else _slope(model, made, (row, places), scores, count)
        found.append(HeadPass(hidden[row, places], scores, row_ids[1:][places], slope))
    return found


def _slope(model: nn.Module, made: list[Any], place: tuple[int, Tensor], logits: Tensor, count: int) -> Slope:
    """`∂ logit / ∂ head output` at a row's places: 1, the factor between them, or that of a soft cap."""
    if len(made) == 1 and made[0][0]._version == made[0][1]:  # noqa: SLF001
        output = made[0][0][:, -count:][place]
        if output.shape == logits.shape:
            if torch.allclose(output, logits, rtol=0, atol=0, equal_nan=True):
                return 1.0
            wide, out = logits.double(), output.double()
            rounding = 8 * max(torch.finfo(part.dtype).eps for part in (logits, output))
            at = out.abs().flatten().argmax()
            factor = float(wide.flatten()[at] / out.flatten()[at])
            if torch.allclose(wide, factor * out, rtol=rounding, atol=rounding):
                return factor
            config: Any = getattr(model, "config", None)
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            cap = getattr(text, "final_logit_softcapping", None)
            if cap and torch.allclose(wide, cap * (out / cap).tanh(), rtol=rounding, atol=rounding * cap):
                slope: Tensor = (1 - (wide / cap).square()).to(accumulator(logits.dtype))
                return slope
    raise ModelError(
        f"{type(model).__name__} changes what its head puts out in a way that gradent does not know (accepted: not at "
        "all, by a factor, or by config.final_logit_softcapping), so that the gradient of the head cannot be read off "
        "a forward. Leave the head's block out (head=False; command line: --no-head), or use gradent.measure."
    )
