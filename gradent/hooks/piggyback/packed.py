"""Packed rows of a trainer's forward: their coefficients, and whether they see nothing of one another.

Letters: R rows in a batch `[B, T]`, L tokens of the longest, K positions of the output, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gradent.hooks.piggyback.coefficients import Coefficients, FusedReadout, LogitsReadout, Readout
from gradent.hooks.piggyback.coefficients import find_readout as find_padded_readout
from gradent.hooks.uses.packed_rows import PackedRows
from gradent.model.facts import computing_dtypes, tolerance
from gradent.model.observed import observed

__all__ = ["PackedCall", "PackedReadout", "find_packed_readout"]


@dataclass(frozen=True)
class PackedReadout:
    """One readout a row, each a view of the whole output and of its gradient."""

    root: Tensor
    rows: PackedRows
    parts: Sequence[Readout]
    mask: Tensor | None = None  # of log-probs, the marked ones: no other is made

    def read(self, grad: Tensor) -> Coefficients:
        """The coefficients of the R rows, from the gradient that arrived at `root`."""
        found = [part.read(view) for part, view in zip(self.parts, self.rows.cut(grad), strict=True)]
        marks, tokens = (
            torch.cat([pad(each, (0, self.rows.length - each.shape[1])) for each in column])
            for column in zip(*((each.marks, each.tokens) for each in found), strict=True)
        )
        c, logp = (torch.cat(column) for column in zip(*((each.c, each.logp) for each in found), strict=True))
        # What a row's last position predicts is the next row's first token: of no response.
        is_separate = all(not bool(at.any()) for at in self._borders(grad))
        return replace(
            found[0], c=c, logp=logp, marks=marks, tokens=tokens, spread=max(each.spread for each in found),
            is_constant=is_separate and all(each.is_constant for each in found),
            is_of_tokens=is_separate and all(each.is_of_tokens for each in found),
        )  # fmt: skip

    def _borders(self, grad: Tensor) -> list[Tensor]:
        """The gradients at the rows' last positions."""
        if self.mask is not None:
            grad = pad(grad * self.mask, (0, self.rows.shape[1] - grad.shape[1]))
        flat = grad.flatten(0, 1)
        return [flat[stop - 1] for _, stop in self.rows.spans]


def find_packed_readout(
    rows: PackedRows, output: Any, kwargs: Mapping[str, Any], input_ids: Tensor, *, temperature: float = 1.0
) -> PackedReadout | str:
    """Where the log-probs of R packed rows, whose tokens are `[R, L]`, can be read, or why nowhere."""
    labels = kwargs.get("labels")
    whole = find_padded_readout(output, kwargs, input_ids.new_zeros(rows.shape), temperature=temperature)
    if isinstance(whole, str):
        return whole
    lengths = [stop - start for start, stop in rows.spans]
    values = whole.root.detach()
    if isinstance(whole, FusedReadout) and whole.root.shape[1] == rows.shape[1] - 1:
        halves = zip(rows.cut(values), rows.cut(whole.mask), lengths, strict=True)
        fused = [FusedReadout(root, mask, length) for root, mask, length in halves]
        return PackedReadout(whole.root, rows, fused, whole.mask)
    if not isinstance(whole, LogitsReadout) or whole.root.shape[1] != rows.shape[1]:
        return f"its output has shape {list(whole.root.shape)}, which does not say all of {len(lengths)} packed rows"
    labelled = [None] * len(lengths) if labels is None else rows.cut(labels[..., None])
    parts: list[Readout] = []
    for row, (root, length, label) in enumerate(zip(rows.cut(values), lengths, labelled, strict=True)):
        marks = None if label is None else label[..., 0]
        parts.append(LogitsReadout(root, input_ids[row : row + 1, :length], marks, temperature))
    return PackedReadout(whole.root, rows, parts)


@dataclass(frozen=True)
class PackedCall:
    """A forward of packed rows, to be tried again."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input_ids: Tensor
    rows: PackedRows

    @torch.no_grad()
    def reaches_over(self) -> float | None:
        """How far a row's logits go by the tokens of the rows before it, scaled; None where rounding says it."""
        start, stop = self._probed
        others = self.input_ids + torch.where(self.input_ids > 0, -1, 1)
        flat, own = others.flatten(), self.input_ids.flatten()
        flat[start:] = own[start:]
        with observed(self.model):
            logits = [self._logits(ids, start, stop) for ids in (self.input_ids, flat.view_as(self.input_ids))]
        difference = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp_min(1e-30))
        limit = tolerance("a later token", computing_dtypes(self.model, self.input_ids.device))
        return difference if difference > limit else None

    @property
    def has_neighbours(self) -> bool:
        """Whether a row has others before it in its row of the batch, so that trying says something."""
        return self._probed[0] % self.rows.shape[1] > 0

    @property
    def _probed(self) -> tuple[int, int]:
        """The row that begins latest in a row of the batch: most may reach into it."""
        return max(self.rows.spans, key=lambda span: span[0] % self.rows.shape[1])

    def _logits(self, ids: Tensor, start: int, stop: int) -> Tensor:
        """Logits `[stop - start, V]` of some positions of `[B, T]` other tokens."""
        kwargs = {name: value for name, value in self.kwargs.items() if name not in ("labels", "fused_lm_head")}
        if "input_ids" in kwargs:
            output = self.model(*self.args, **(kwargs | {"input_ids": ids}))
        else:
            at = next(place for place, arg in enumerate(self.args) if isinstance(arg, Tensor))
            output = self.model(*self.args[:at], ids, *self.args[at + 1 :], **kwargs)
        logits = getattr(output, "logits", None)
        if logits is None:
            logits = output[0] if isinstance(output, tuple) else output
        found: Tensor = logits.flatten(0, 1)[start:stop].double()
        return found
