"""The shape of one forward: how many rows it has, how long they are, and how tensors of the pass split into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """One forward of R rows, padded to L tokens."""

    rows: int
    length: int
    look: Callable[[], Sequence[tuple[int, int]] | None] | None = field(default=None, compare=False)  # finds `spans`
    tokens: tuple[int, ...] = ()  # lengths of the axis of tokens, without which an axis of R need not be of rows
    certain: bool = True  # no where `spans` are yet to be confirmed when the backward is over

    @cached_property
    def spans(self) -> Sequence[tuple[int, int]] | None:
        """Of each row, `(start, stop)` of the positions whose output gradients may be nonzero; None if unknown."""
        return None if self.look is None else self.look()

    @property
    def ends(self) -> list[int] | None:
        """Of each row, the position from which output gradients are zero; None too if rows do not begin at once."""
        spans = self.spans
        return None if spans is None or any(start for start, _ in spans) else [stop for _, stop in spans]

    def splits(self, tensor: Tensor, features: int) -> bool:
        """Whether the rows of an operand or result can be told apart, its last `features` axes being features."""
        if self.rows == 1:
            return tensor.dim() >= features
        if tensor.dim() == features + 1:  # R tokens are more likely than one token of every row
            return tensor.shape[0] == self.rows * self.length
        if tensor.dim() <= features + 1 or tensor.shape[0] != self.rows:
            return False
        # Images can be as many as rows and belong to others: such a forward's rows have their tokens beside them.
        return not self.tokens or any(size in self.tokens for size in tensor.shape[1 : tensor.dim() - features])

    def split(self, tensor: Tensor, features: int) -> Tensor:
        """View a tensor that `splits` as `[R, M, *feature axes]` (a copy if its strides do not allow a view)."""
        return tensor.reshape(self.rows, -1, *tensor.shape[tensor.dim() - features :])
