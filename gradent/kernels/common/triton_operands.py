"""What the kernels are given: packed or padded factors of many rows, and where each row's tokens lie."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations
from operator import add

import torch
from torch import Tensor

from gradent.errors import InputError
from gradent.kernels.common.streams import is_capturing, sent

__all__ = ["CACHED", "DTYPES", "Factors", "Groups", "Spans", "blank", "couples", "current_device", "on_device"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take; float64 is the reference's business."""

CACHED = 128
"""Spans, and tables of spans on devices, that are remembered: a step asks for few, and for each once a matrix."""

Product = tuple[int, int, int, int, int]
"""Kind, start and length of a row, start and length of another; kinds: see `Spans.products`."""


def blank(*shape: int, dtype: torch.dtype, device: torch.device, poison: bool) -> Tensor:
    """Memory that a kernel is to fill: as it comes, or full of nan, so that what is left out shows."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    return memory.fill_(float("nan")) if poison else memory


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, which is where Triton launches; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True, init=False)
class Spans:
    """Where the tokens of k pairs lie in the factors' rows: four sequences of k numbers."""

    chosen_start: tuple[int, ...]  # first row of each chosen response in `u_w` and `v_w`
    chosen_length: tuple[int, ...]  # its tokens; 0 for a zero gradient
    rejected_start: tuple[int, ...]  # the same of the rejected ones, in `u_l` and `v_l`
    rejected_length: tuple[int, ...]

    def __init__(
        self,
        chosen_start: Sequence[int] | Tensor,
        chosen_length: Sequence[int] | Tensor,
        rejected_start: Sequence[int] | Tensor,
        rejected_length: Sequence[int] | Tensor,
    ) -> None:
        """Spans of integers, or of int64 tensors, which belong on the CPU: a launch reads them."""
        parts = (chosen_start, chosen_length, rejected_start, rejected_length)
        for name, part in zip(type(self).__match_args__, parts, strict=True):
            object.__setattr__(self, name, _integers(part))
        counts = [len(part) for part in self._parts]
        if len(set(counts)) != 1:
            raise InputError(f"spans are four numbers a pair; got {', '.join(map(str, counts))}.")
        if any(min(part, default=0) < 0 for part in self._parts):
            raise InputError("spans hold starts and lengths, none of them negative.")

    def __len__(self) -> int:
        return len(self.chosen_start)

    @classmethod
    def of_pair(cls, chosen: int, rejected: int) -> Spans:
        """One pair, whose T_w and T_l tokens are all there is."""
        return cls((0,), (chosen,), (0,), (rejected,))

    @classmethod
    def padded(cls, pairs: int, tokens: int, lengths: Sequence[int] | Tensor | None = None) -> Spans:
        """Rows `[k, T]` of each side, right-padded and flattened to `[k T]`, with 2k lengths, chosen rows first."""
        return _padded(pairs, tokens, None if lengths is None else _integers(lengths))

    @classmethod
    def packed(cls, chosen: Sequence[int], rejected: Sequence[int]) -> Spans:
        """Rows of these lengths on each side, one after the other, without padding."""
        return cls(_offsets(chosen), chosen, _offsets(rejected), rejected)

    @property
    def longest(self) -> int:
        """Most tokens of any row; 0 without pairs."""
        return max((*self.chosen_length, *self.rejected_length), default=0)

    @property
    def pairs(self) -> float:
        """How many pairs take as many products of tokens: k."""
        return len(self)

    @property
    def count(self) -> int:
        """Products of rows: 3k."""
        return 3 * len(self)

    @property
    def ends(self) -> tuple[int, int]:
        """Behind the last token, chosen and rejected."""
        chosen, rejected = map(add, *self._parts[:2]), map(add, *self._parts[2:])
        return max(chosen, default=0), max(rejected, default=0)

    @property
    def lines(self) -> list[tuple[int, ...]]:
        """`[k, 4]`, start and length of chosen, start and length of rejected."""
        return list(zip(*self._parts, strict=True))

    @property
    def products(self) -> list[Product]:
        """`[3k, 5]`; kinds: 0 chosen with itself, 1 rejected with itself, 2 chosen with rejected."""
        return [(kind, *line) for line in zip(*self._parts, strict=True) for kind in (0, 1, 2)]

    @property
    def _parts(self) -> tuple[tuple[int, ...], ...]:
        return self.chosen_start, self.chosen_length, self.rejected_start, self.rejected_length


@dataclass(frozen=True, init=False)
class Groups:
    """Where the tokens of N rows lie in one pair of factors, and which rows are multiplied with each other."""

    lengths: tuple[int, ...]  # tokens of each of the N rows; 0 for a zero gradient
    members: tuple[tuple[int, ...], ...]  # numbers of the rows of each group
    starts: tuple[int, ...]  # first token of each of the N rows

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        members: Sequence[Sequence[int]],
        starts: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Groups of rows that lie one after the other, or at `starts`."""
        counts = _integers(lengths)
        places = tuple(_offsets(counts)) if starts is None else _integers(starts)
        for name, value in (("lengths", counts), ("members", tuple(map(tuple, members))), ("starts", places)):
            object.__setattr__(self, name, value)
        if len(places) != len(counts) or min((*places, *counts), default=0) < 0:
            raise InputError(
                f"rows have a start and a length each, none of them negative; got starts {list(places)} and lengths "
                f"{list(counts)}."
            )
        if any(not 0 <= row < len(counts) for group in self.members for row in group):
            raise InputError(f"groups are of rows 0 to {len(counts) - 1}; got {list(self.members)}.")

    @classmethod
    def padded(cls, tokens: int, lengths: Sequence[int] | Tensor, members: Sequence[Sequence[int]]) -> Groups:
        """Rows `[N, T]`, right-padded and flattened to `[N T]`."""
        counts = _integers(lengths)
        if max(counts, default=0) > tokens:
            raise InputError(f"lengths are none above {tokens}; got {list(counts)}.")
        return cls(counts, members, [row * tokens for row in range(len(counts))])

    @property
    def longest(self) -> int:
        """Most tokens of any row; 0 without rows."""
        return max(self.lengths, default=0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each group."""
        return tuple(map(len, self.members))

    @property
    def pairs(self) -> float:
        """How many pairs take as many products of tokens: n²/4 a group of n."""
        return sum(size**2 for size in self.sizes) / 4

    @property
    def count(self) -> int:
        """Products of rows: n(n + 1)/2 a group of n."""
        return sum(size * (size + 1) // 2 for size in self.sizes)

    @property
    def ends(self) -> tuple[int, int]:
        """Behind the last token, twice: the factors of both sides are the same."""
        end = max(map(add, self.starts, self.lengths), default=0)
        return end, end

    @property
    def products(self) -> list[Product]:
        """As `Spans.products`, in the order of `couples`, group by group."""
        return [
            (0 if i == j else 2, self.starts[i], self.lengths[i], self.starts[j], self.lengths[j])
            for group in self.members
            for i, j in couples(group)
        ]

    @property
    def lines(self) -> list[tuple[int, int]]:
        """`[G + Σn, 2]`: of each group the first of its lines here and their number; of each row start and length."""
        first = [len(self.members) + offset for offset in _offsets(self.sizes)]
        heads = list(zip(first, self.sizes, strict=True))
        return heads + [(self.starts[row], self.lengths[row]) for group in self.members for row in group]


def couples(rows: Sequence[int]) -> list[tuple[int, int]]:
    """The products of a group in their order: each row with itself, then the first with every later one, and so on."""
    return [*zip(rows, rows, strict=True), *combinations(rows, 2)]


def on_device(holder: Hashable, name: str, device: torch.device) -> Tensor:
    """An int64 table of `holder`, its attribute `name`, on the device without anyone waiting; not to be written to."""
    if device.type != "cuda":
        return _table(holder, name, device, 0)
    if is_capturing(device):  # the copy would only be made when the graph is run
        return _table.__wrapped__(holder, name, device, 0)
    # The copy is in the order of the current stream, so that each stream has a table of its own.
    return _table(holder, name, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=CACHED)
def _table(holder: Hashable, name: str, device: torch.device, stream: int) -> Tensor:
    del stream  # of the key alone
    return sent(torch.tensor(getattr(holder, name), dtype=torch.int64, device="cpu"), device)


def _integers(numbers: Sequence[int] | Tensor) -> tuple[int, ...]:
    if not isinstance(numbers, Tensor):
        return tuple(numbers)
    if numbers.dtype != torch.int64 or numbers.dim() != 1:
        raise InputError(f"spans are integers, one a pair or row; got {numbers.dtype} {list(numbers.shape)}.")
    return tuple(numbers.tolist())


def _offsets(lengths: Sequence[int]) -> list[int]:
    """Where rows of these lengths begin that lie one after the other."""
    return [0, *accumulate(lengths)][: len(lengths)]


@lru_cache(maxsize=CACHED)
def _padded(pairs: int, tokens: int, lengths: tuple[int, ...] | None) -> Spans:
    starts = range(0, pairs * tokens, tokens) if tokens else (0,) * pairs
    if lengths is None:
        lengths = (tokens,) * (2 * pairs)
    if len(lengths) != 2 * pairs or max(lengths, default=0) > tokens:
        raise InputError(f"lengths are [{2 * pairs}], none above {tokens}; got {list(lengths)}.")
    return Spans(starts, lengths[:pairs], starts, lengths[pairs:])


@dataclass(frozen=True)
class Factors:
    """The factors of rows, as a kernel takes them; those of a pair may lie in two tensors, others lie in one."""

    u_w: Tensor  # `[N_w, O]`, tokens of all chosen rows; float32, bfloat16 or float16, any strides
    v_w: Tensor  # `[N_w, I]`; its dtype may be another than that of `u_w`
    u_l: Tensor  # `[N_l, O]`, tokens of all rejected rows, of the dtype of `u_w`
    v_l: Tensor  # `[N_l, I]`, of the dtype of `v_w`
    spans: Spans | Groups

    def __post_init__(self) -> None:
        u_w, v_w, u_l, v_l = self.operands
        if not u_w.dim() == v_w.dim() == u_l.dim() == v_l.dim() == 2:
            raise InputError(f"factors are matrices, tokens by features; got {self._shapes()}.")
        if u_w.dtype not in DTYPES or v_w.dtype not in DTYPES:
            raise InputError(
                f"the kernels take float32, bfloat16 and float16; got {self._shapes()}. "
                "Use gradent.kernels.common.numerics for others."
            )
        if u_w.dtype != u_l.dtype or v_w.dtype != v_l.dtype:
            raise InputError(f"chosen and rejected have one dtype on each side of a weight; got {self._shapes()}.")
        if not u_w.device == v_w.device == u_l.device == v_l.device:
            devices = ", ".join(str(tensor.device) for tensor in self.operands)
            raise InputError(f"factors lie on one device; got {devices}.")
        (chosen, rows), (rejected, _) = u_w.shape, u_l.shape
        if rows != u_l.shape[1] or v_w.shape[1] != v_l.shape[1]:
            raise InputError(f"chosen and rejected have the same O and the same I; got {self._shapes()}.")
        if chosen != v_w.shape[0] or rejected != v_l.shape[0]:
            raise InputError(f"u and v have a row for every token; got {self._shapes()}.")
        for side, end, most in zip(("chosen", "rejected"), self.spans.ends, (chosen, rejected), strict=True):
            if end > most:
                raise InputError(f"a {side} span ends behind the last of {most} rows: at {end}.")

    def _shapes(self) -> str:
        named = zip(("u_w", "v_w", "u_l", "v_l"), self.operands, strict=True)
        return ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in named)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors, as kernels take them first."""
        return self.u_w, self.v_w, self.u_l, self.v_l

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
        return tuple(stride for tensor in self.operands for stride in tensor.stride())
