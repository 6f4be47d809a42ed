"""Rows that lie one behind the other in one row of the batch: packed, flattened or padding-free batches.

Letters: B rows of the batch of T tokens each, R responses (rows) in them, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["PACKING", "PackedRows", "find_packed_rows"]

_ENDS = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q", "cu_seq_lens")
_NUMBERS = ("seq_idx", "segment_ids", "sequence_ids", "document_ids", "row_ids")
PACKING = frozenset({
    "input_ids", "position_ids", "attention_mask", "cu_seq_lens_k", "cu_seqlens_k", "max_length_q", "max_length_k",
    "max_seqlen_q", "max_seqlen_k", *_ENDS, *_NUMBERS,
})  # fmt: skip
"""Arguments by which a model is told of packed rows; of rows on their own it needs none of them."""


@dataclass(frozen=True)
class PackedRows:
    """Where each of R rows lies in a batch `[B, T]`: `(start, stop)` in its B·T tokens, one row after the other."""

    shape: tuple[int, int]
    spans: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        """B·T."""
        return self.shape[0] * self.shape[1]

    @cached_property
    def length(self) -> int:
        """L."""
        return max(stop - start for start, stop in self.spans)

    def token_axis(self, shape: Sequence[int], features: int) -> int | None:
        """Which axis of a tensor `[B, ..., T, ..., *features]` is T, or 0 for `[B·T, *features]`; None if unclear."""
        leading = tuple(shape[: len(shape) - features])
        if len(leading) == 1:
            return 0 if leading[0] == self.total else None
        if len(leading) < 2 or leading[0] != self.shape[0]:
            return None
        axes = [axis for axis in range(1, len(leading)) if leading[axis] == self.shape[1]]
        return axes[0] if len(axes) == 1 else None

    def unpack(self, tensor: Tensor, axis: int) -> Tensor:
        """`[R, L, *other axes]` from a tensor whose `token_axis` this is: each row's tokens, then zeros."""
        flat = tensor if axis == 0 else tensor.movedim(axis, 1).flatten(0, 1)
        rows = flat.new_zeros(len(self.spans), self.length, *flat.shape[1:])
        for row, (start, stop) in zip(rows, self.spans, strict=True):
            row[: stop - start] = flat[start:stop]
        return rows

    def cut(self, output: Tensor) -> list[Tensor]:
        """Each row's part `[1, ...]` of logits `[B, T, V]`, or of log-probs `[B, T - 1]`."""
        less = 1 if output.dim() == 2 else 0
        parts = []
        for start, stop in self.spans:
            number, first = divmod(start, self.shape[1])
            parts.append(output[number : number + 1, first : first + stop - start - less])
        return parts

    def mask(self, device: torch.device) -> Tensor:
        """Which of `[R, L]` are tokens, bool."""
        lengths = torch.tensor([stop - start for start, stop in self.spans], device=device)
        return torch.arange(self.length, device=device) < lengths[:, None]


def find_packed_rows(input_ids: Tensor, kwargs: Mapping[str, Any]) -> PackedRows | None:
    """The rows of a forward on `input_ids` `[B, T]` where its arguments say that they are packed; else None."""
    batch, length = input_ids.shape
    mask = kwargs.get("attention_mask")
    real = torch.ones(batch, length, dtype=torch.bool)
    begins = _read_begins(kwargs, batch, length)
    if isinstance(mask, Tensor) and tuple(mask.shape) == (batch, length):
        real = mask.detach().cpu() != 0
        numbered = mask.detach().cpu()
        if begins is None and not mask.is_floating_point() and bool((numbered > 1).any()):
            begins = _differs(numbered)
    if begins is None and isinstance(mask, Tensor) and tuple(mask.shape) == (batch, 1, length, length):
        begins = _read_blocks(mask.detach()[:, 0])
    if begins is None:
        return None
    begins = begins | ~torch.nn.functional.pad(real, (1, -1))  # or where padding ends
    marks = (begins & real).tolist()
    spans: list[tuple[int, int]] = []
    has_several = False
    for number, (row, inside) in enumerate(zip(marks, real.tolist(), strict=True)):
        starts = [place for place, is_start in enumerate(row) if is_start]
        has_several |= len(starts) > 1
        for start, following in pairwise([*starts, length]):
            stop = next((place for place in range(start, following) if not inside[place]), following)
            if stop > start + 1:  # one token is no response: padding
                spans.append((number * length + start, number * length + stop))
    return PackedRows((batch, length), tuple(spans)) if has_several else None


def _read_begins(kwargs: Mapping[str, Any], batch: int, length: int) -> Tensor | None:
    """Which tokens `[B, T]` begin a row, from where rows end, their numbers, or their positions; None if not said."""
    for name in _ENDS:
        ends = kwargs.get(name)
        if isinstance(ends, Tensor) and ends.dim() == 1 and batch == 1 and len(ends) > 1:
            begins = torch.zeros(1, length, dtype=torch.bool)
            begins[0, [end for end in ends.tolist() if end < length]] = True
            return begins
    for name in _NUMBERS:
        numbers = kwargs.get(name)
        if isinstance(numbers, Tensor) and tuple(numbers.shape) == (batch, length):
            return _differs(numbers.detach().cpu())
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == 4:  # of text, then an image's axes
        positions = positions[0]
    if isinstance(positions, Tensor) and tuple(positions.shape) == (batch, length):
        return positions.detach().cpu() == 0
    return None


def _differs(numbers: Tensor) -> Tensor:
    """Where `[B, T]` differs from the token before, bool; the first token counts as such."""
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return begins


def _read_blocks(mask: Tensor) -> Tensor:
    """Which tokens `[B, T]` do not attend to the one before, from a mask `[B, T, T]`, bool or added to the scores."""
    before = mask.diagonal(-1, 1, 2)
    is_open = before if mask.dtype == torch.bool else before > -1 if mask.is_floating_point() else before != 0
    begins = torch.ones(mask.shape[:2], dtype=torch.bool)
    begins[:, 1:] = ~is_open.cpu()
    return begins
