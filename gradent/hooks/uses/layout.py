"""The shape of one forward: how many rows it has, how long they are, and how tensors of the pass split into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from gradent.hooks.uses.packed_rows import PackedRows

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """One forward of R rows, padded to L tokens, or packed."""

    rows: int
    length: int
    look: Callable[[], Sequence[tuple[int, int]] | None] | None = field(default=None, compare=False)  # finds `spans`
    tokens: tuple[int, ...] = ()  # lengths of the axis of tokens, without which an axis of R need not be of rows
    certain: bool = True  # no where `spans` are yet to be confirmed when the backward is over
    packed: PackedRows | None = None  # where rows lie that share a row of the batch

    @property
    def shape(self) -> tuple[int, int]:
        """The batch's rows and tokens."""
        return (self.rows, self.length) if self.packed is None else self.packed.shape

    @property
    def starts(self) -> list[int]:
        """Where each row begins among all tokens of the batch."""
        if self.packed is None:
            return [row * self.length for row in range(self.rows)]
        return [start for start, _ in self.packed.spans]

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
        if self.packed is not None:
            return self.packed.token_axis(tensor.shape, features) is not None
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
        if self.packed is not None:
            axis = self.packed.token_axis(tensor.shape, features)
            assert axis is not None
            tensor = self.packed.unpack(tensor, axis)
        return tensor.reshape(self.rows, -1, *tensor.shape[tensor.dim() - features :])

    def broadcasts(self, out: Tensor, operand: Tensor) -> bool:
        """Whether an operand of an elementwise result is shared by all its rows, and these lead in it."""
        if self.packed is not None:
            axis = 0 if out.dim() == 2 else 1
            at = axis - out.dim() + operand.dim()  # the tokens' axis, in the operand
            is_shared = all(operand.shape[place] == 1 for place in range(max(0, at + 1)))
            return out.dim() > 1 and self.packed.token_axis(out.shape, out.dim() - axis - 1) == axis and is_shared
        if self.rows == 1:
            return True
        if out.dim() < 2 or (out.shape[0] != self.rows and not self.is_flat(out)):
            return False
        return operand.dim() < out.dim() or operand.shape[0] == 1

    def is_flat(self, tensor: Tensor) -> bool:
        """Whether a tensor is `[tokens of all rows, features]`, whose order is to be looked at."""
        return tensor.dim() == 2 and tensor.shape[0] == self.shape[0] * self.shape[1]

    def by_row(self, tensor: Tensor) -> Tensor:
        """A result that `broadcasts` as `[R, *shape of a row]`."""
        if self.packed is not None:
            return self.packed.unpack(tensor, 0 if tensor.dim() == 2 else 1)
        if self.rows == 1:
            return tensor[None]
        if tensor.shape[0] == self.rows:
            return tensor
        return tensor.reshape(self.rows, self.length, *tensor.shape[1:])
