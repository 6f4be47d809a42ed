"""What the kernels are given: packed or padded factors of many pairs, and where each row's tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.errors import InputError

__all__ = ["DTYPES", "Factors", "Spans", "blank", "current_device"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take; float64 is the reference's business."""


def blank(*shape: int, dtype: torch.dtype, device: torch.device, poison: bool) -> Tensor:
    """Memory that a kernel is to fill: as it comes, or full of nan, so that what is left out shows."""
    made = torch.empty(shape, dtype=dtype, device=device)
    return made.fill_(float("nan")) if poison else made


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, which is where Triton launches; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Spans:
    """Where the tokens of k pairs lie in the factors' rows.

    Attributes:
        chosen_start: int64 `[k]`, first row of each chosen response in `u_w` and `v_w`.
        chosen_length: int64 `[k]`, its tokens; 0 for a zero gradient.
        rejected_start: the same of the rejected ones, in `u_l` and `v_l`.
        rejected_length: int64 `[k]`.

    Tensors belong on the CPU: a launch needs the longest length, and would wait for a device to say it.

    Raises:
        InputError: not four int64 tensors of one length, or a negative number.
    """

    chosen_start: Tensor
    chosen_length: Tensor
    rejected_start: Tensor
    rejected_length: Tensor

    def __post_init__(self) -> None:
        parts = (self.chosen_start, self.chosen_length, self.rejected_start, self.rejected_length)
        if any(part.dtype != torch.int64 or part.dim() != 1 or len(part) != len(parts[0]) for part in parts):
            got = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
            raise InputError(f"spans are four int64 tensors of shape [pairs]; got {got}.")
        if any(bool((part < 0).any()) for part in parts):
            raise InputError("spans hold starts and lengths, none of them negative.")

    def __len__(self) -> int:
        return len(self.chosen_start)

    @classmethod
    def of_pair(cls, chosen: int, rejected: int) -> Spans:
        """One pair, whose tokens are all there is.

        Args:
            chosen: T_w, rows of `u_w`.
            rejected: T_l, rows of `u_l`.

        Returns:
            The spans, k = 1.
        """
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(zero, torch.tensor([chosen]), zero, torch.tensor([rejected]))

    @classmethod
    def padded(cls, pairs: int, tokens: int, lengths: Tensor | None = None) -> Spans:
        """Rows `[k, T]` of each side, right-padded and flattened to `[k T]`.

        Args:
            pairs: k.
            tokens: T, padding included.
            lengths: int64 `[2k]`, the tokens of each row, chosen rows first; None for T everywhere.

        Returns:
            The spans.

        Raises:
            InputError: lengths of another shape, or longer than T.
        """
        starts = torch.arange(pairs) * tokens
        if lengths is None:
            lengths = torch.full((2 * pairs,), tokens)
        lengths = lengths.cpu()
        if lengths.shape != (2 * pairs,) or bool((lengths > tokens).any()):
            raise InputError(f"lengths are [{2 * pairs}], none above {tokens}; got {lengths.tolist()}.")
        return cls(starts, lengths[:pairs], starts, lengths[pairs:])

    @classmethod
    def packed(cls, chosen: Sequence[int], rejected: Sequence[int]) -> Spans:
        """Rows one after the other, without padding.

        Args:
            chosen: tokens of each chosen row.
            rejected: tokens of each rejected row.

        Returns:
            The spans.
        """
        lengths = [torch.tensor(list(side), dtype=torch.int64) for side in (chosen, rejected)]
        starts = [side.cumsum(0) - side for side in lengths]
        return cls(starts[0], lengths[0], starts[1], lengths[1])

    @property
    def longest(self) -> int:
        """Most tokens of any row; 0 without pairs."""
        return int(max([0, *self.chosen_length.tolist(), *self.rejected_length.tolist()]))

    def table(self, device: torch.device) -> Tensor:
        """int64 `[k, 4]` on the device: start and length of chosen, start and length of rejected."""
        parts = (self.chosen_start, self.chosen_length, self.rejected_start, self.rejected_length)
        return torch.stack(parts, 1).to(device)


@dataclass(frozen=True)
class Factors:
    """The factors of k pairs, as a kernel takes them.

    Attributes:
        u_w: `[N_w, O]`, tokens of all chosen rows; float32, bfloat16 or float16, any strides.
        v_w: `[N_w, I]`; its dtype may be another than that of `u_w`.
        u_l: `[N_l, O]`, tokens of all rejected rows, of the dtype of `u_w`.
        v_l: `[N_l, I]`, of the dtype of `v_w`.
        spans: where each row's tokens lie.

    Raises:
        InputError: shapes, dtypes, devices or spans that do not go together.
    """

    u_w: Tensor
    v_w: Tensor
    u_l: Tensor
    v_l: Tensor
    spans: Spans

    def __post_init__(self) -> None:
        tensors = {"u_w": self.u_w, "v_w": self.v_w, "u_l": self.u_l, "v_l": self.v_l}
        got = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items())
        if any(tensor.dim() != 2 for tensor in tensors.values()):
            raise InputError(f"factors are matrices, tokens by features; got {got}.")
        if any(tensor.dtype not in DTYPES for tensor in tensors.values()):
            raise InputError(
                f"the kernels take float32, bfloat16 and float16; got {got}. Use gradent.kernels.reference for others."
            )
        if self.u_w.dtype != self.u_l.dtype or self.v_w.dtype != self.v_l.dtype:
            raise InputError(f"chosen and rejected have one dtype on each side of a weight; got {got}.")
        if len({tensor.device for tensor in tensors.values()}) != 1:
            raise InputError(f"factors lie on one device; got {', '.join(str(t.device) for t in tensors.values())}.")
        if self.u_w.shape[1] != self.u_l.shape[1] or self.v_w.shape[1] != self.v_l.shape[1]:
            raise InputError(f"chosen and rejected have the same O and the same I; got {got}.")
        if len(self.u_w) != len(self.v_w) or len(self.u_l) != len(self.v_l):
            raise InputError(f"u and v have a row for every token; got {got}.")
        spans = self.spans
        for side, start, length, rows in (
            ("chosen", spans.chosen_start, spans.chosen_length, len(self.u_w)),
            ("rejected", spans.rejected_start, spans.rejected_length, len(self.u_l)),
        ):
            if bool((start + length > rows).any()):
                raise InputError(f"a {side} span ends behind the last of {rows} rows: {(start + length).tolist()}.")

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.u_w.device

    @property
    def rows(self) -> int:
        """O."""
        return int(self.u_w.shape[1])

    @property
    def cols(self) -> int:
        """I."""
        return int(self.v_w.shape[1])

    @property
    def widest(self) -> torch.dtype:
        """The dtype in which operands of two dtypes meet: their own, or float32 where they differ."""
        return self.u_w.dtype if self.u_w.dtype == self.v_w.dtype else torch.float32

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of both axes of `u_w`, `v_w`, `u_l`, `v_l`."""
        return (*self.u_w.stride(), *self.v_w.stride(), *self.u_l.stride(), *self.v_l.stride())
