"""What the kernels are given: packed or padded factors of many pairs, and where each row's tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import add

import torch
from torch import Tensor

from gradent.errors import InputError
from gradent.kernels.common.streams import is_capturing, sent

__all__ = ["DTYPES", "Factors", "Spans", "blank", "current_device"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take; float64 is the reference's business."""


def blank(*shape: int, dtype: torch.dtype, device: torch.device, poison: bool) -> Tensor:
    """Memory that a kernel is to fill: as it comes, or full of nan, so that what is left out shows."""
    made = torch.empty(shape, dtype=dtype, device=device)
    return made.fill_(float("nan")) if poison else made


KEPT = 128
"""Spans, and tables of spans on devices, that are kept: a step asks for few, and for each of them once a matrix."""


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, which is where Triton launches; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True, init=False)
class Spans:
    """Where the tokens of k pairs lie in the factors' rows.

    Attributes:
        chosen_start: k numbers, the first row of each chosen response in `u_w` and `v_w`.
        chosen_length: k numbers, its tokens; 0 for a zero gradient.
        rejected_start: the same of the rejected ones, in `u_l` and `v_l`.
        rejected_length: k numbers.
    """

    chosen_start: tuple[int, ...]
    chosen_length: tuple[int, ...]
    rejected_start: tuple[int, ...]
    rejected_length: tuple[int, ...]

    def __init__(
        self,
        chosen_start: Sequence[int] | Tensor,
        chosen_length: Sequence[int] | Tensor,
        rejected_start: Sequence[int] | Tensor,
        rejected_length: Sequence[int] | Tensor,
    ) -> None:
        """Spans of the numbers given, as integers or as int64 tensors, which belong on the CPU: a launch reads them.

        Raises:
            InputError: not four times as many integers, or a negative one.
        """
        given = (chosen_start, chosen_length, rejected_start, rejected_length)
        for name, part in zip(type(self).__match_args__, given, strict=True):
            object.__setattr__(self, name, _integers(part))
        parts = self._parts
        if len({len(part) for part in parts}) != 1:
            raise InputError(f"spans are four numbers a pair; got {', '.join(str(len(part)) for part in parts)}.")
        if any(min(part, default=0) < 0 for part in parts):
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
        return cls((0,), (chosen,), (0,), (rejected,))

    @classmethod
    def padded(cls, pairs: int, tokens: int, lengths: Sequence[int] | Tensor | None = None) -> Spans:
        """Rows `[k, T]` of each side, right-padded and flattened to `[k T]`.

        Args:
            pairs: k.
            tokens: T, padding included.
            lengths: 2k integers or int64 `[2k]`, the tokens of each row, chosen rows first; None for T everywhere.

        Returns:
            The spans.

        Raises:
            InputError: another number of lengths, or one that is longer than T.
        """
        return _padded(pairs, tokens, None if lengths is None else _integers(lengths))

    @classmethod
    def packed(cls, chosen: Sequence[int], rejected: Sequence[int]) -> Spans:
        """Rows one after the other, without padding.

        Args:
            chosen: tokens of each chosen row.
            rejected: tokens of each rejected row.

        Returns:
            The spans.
        """
        starts = [[0, *accumulate(side)][: len(side)] for side in (chosen, rejected)]
        return cls(starts[0], chosen, starts[1], rejected)

    @property
    def longest(self) -> int:
        """Most tokens of any row; 0 without pairs."""
        return max((*self.chosen_length, *self.rejected_length), default=0)

    def table(self, device: torch.device) -> Tensor:
        """The spans as a kernel reads them, kept: a step's matrices have few spans among them.

        A device gets its table without anyone waiting, in the order of its current stream, so that each stream has one.

        Args:
            device: where to.

        Returns:
            int64 `[k, 4]`, start and length of chosen, start and length of rejected; not to be written to.
        """
        if device.type != "cuda":
            return _table(self, device, 0)
        if is_capturing(device):  # the copy would only be made when the graph is run
            return _table.__wrapped__(self, device, 0)
        return _table(self, device, torch.cuda.current_stream(device).cuda_stream)

    @property
    def _parts(self) -> tuple[tuple[int, ...], ...]:
        return self.chosen_start, self.chosen_length, self.rejected_start, self.rejected_length


def _integers(numbers: Sequence[int] | Tensor) -> tuple[int, ...]:
    if not isinstance(numbers, Tensor):
        return tuple(numbers)
    if numbers.dtype != torch.int64 or numbers.dim() != 1:
        raise InputError(f"spans are integers, one a pair or row; got {numbers.dtype} {list(numbers.shape)}.")
    return tuple(numbers.tolist())


@lru_cache(maxsize=KEPT)
def _padded(pairs: int, tokens: int, lengths: tuple[int, ...] | None) -> Spans:
    starts = range(0, pairs * tokens, tokens) if tokens else (0,) * pairs
    if lengths is None:
        lengths = (tokens,) * (2 * pairs)
    if len(lengths) != 2 * pairs or max(lengths, default=0) > tokens:
        raise InputError(f"lengths are [{2 * pairs}], none above {tokens}; got {list(lengths)}.")
    return Spans(starts, lengths[:pairs], starts, lengths[pairs:])


@lru_cache(maxsize=KEPT)
def _table(spans: Spans, device: torch.device, stream: int) -> Tensor:
    del stream  # of the key alone
    rows = zip(spans.chosen_start, spans.chosen_length, spans.rejected_start, spans.rejected_length, strict=True)
    table = torch.tensor(list(rows), dtype=torch.int64, device="cpu").view(len(spans), 4)
    return sent(table, device)


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
        u_w, v_w, u_l, v_l = self.u_w, self.v_w, self.u_l, self.v_l
        if not u_w.dim() == v_w.dim() == u_l.dim() == v_l.dim() == 2:
            raise InputError(f"factors are matrices, tokens by features; got {self._said()}.")
        if u_w.dtype not in DTYPES or v_w.dtype not in DTYPES:
            raise InputError(
                f"the kernels take float32, bfloat16 and float16; got {self._said()}. "
                "Use gradent.kernels.common.numerics for others."
            )
        if u_w.dtype != u_l.dtype or v_w.dtype != v_l.dtype:
            raise InputError(f"chosen and rejected have one dtype on each side of a weight; got {self._said()}.")
        if not u_w.device == v_w.device == u_l.device == v_l.device:
            devices = ", ".join(str(tensor.device) for tensor in (u_w, v_w, u_l, v_l))
            raise InputError(f"factors lie on one device; got {devices}.")
        (chosen, rows), (rejected, _) = u_w.shape, u_l.shape
        if rows != u_l.shape[1] or v_w.shape[1] != v_l.shape[1]:
            raise InputError(f"chosen and rejected have the same O and the same I; got {self._said()}.")
        if chosen != v_w.shape[0] or rejected != v_l.shape[0]:
            raise InputError(f"u and v have a row for every token; got {self._said()}.")
        spans = self.spans
        for side, starts, lengths, most in (
            ("chosen", spans.chosen_start, spans.chosen_length, chosen),
            ("rejected", spans.rejected_start, spans.rejected_length, rejected),
        ):
            if max(map(add, starts, lengths), default=0) > most:
                raise InputError(
                    f"a {side} span ends behind the last of {most} rows: {list(map(add, starts, lengths))}."
                )

    def _said(self) -> str:
        tensors = {"u_w": self.u_w, "v_w": self.v_w, "u_l": self.u_l, "v_l": self.v_l}
        return ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items())

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
