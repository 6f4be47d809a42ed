"""Collects every token's gradient, parameter by parameter, and reduces a parameter once it is complete.

The counterpart of `Ledger` for the token level: there a row has one gradient, here each of its tokens has one.

Letters: m tokens of a strand, M positions of its row, O and I the rows and columns of a slot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import Factored, Form, Materialized, SparseRows
from gradent.kernels.common.budget import least_budget
from gradent.kernels.common.wanted import Wanted
from gradent.tokens.contractions import Block, Entries, flat_entries, lone_entries, shared_entries, tied_entries

__all__ = ["Flat", "Lone", "Odd", "Part", "Shared", "TokenLedger"]

Slot = tuple[int, ...]


@dataclass(frozen=True)
class Shared:
    """`G_i = Σ_p b_{i,p} a_pᵀ`, or its transpose where b is not on the slot's rows."""

    block: Block
    b_on_rows: bool

    @property
    def side(self) -> int:
        """0 for chosen, 1 for rejected."""
        return self.block.side

    @property
    def tokens(self) -> Sequence[int]:
        """Numbers of the tokens on their side."""
        return self.block.tokens

    @property
    def looked_up(self) -> bool:
        """Whether the shared operand are ids."""
        return self.block.a.dtype == torch.int64

    def forms(self) -> Iterator[Form]:
        """Each token's gradient."""
        for b in self.block.b:
            if self.looked_up:
                yield SparseRows(self.block.a, b)
            else:
                yield Factored(b, self.block.a) if self.b_on_rows else Factored(self.block.a, b)


@dataclass(frozen=True)
class Lone:
    """`G_i = u_i v_iᵀ`: a use behind which a token meets its own position alone. u `[m, O]`, v `[m, I]`."""

    side: int
    tokens: Sequence[int]
    u: Tensor
    v: Tensor

    def forms(self) -> Iterator[Form]:
        """Each token's gradient."""
        for u, v in zip(self.u, self.v, strict=True):
            yield Factored(u[None], v[None])


@dataclass(frozen=True)
class Flat:
    """Gradients as such, `[m, *slot]`."""

    side: int
    tokens: Sequence[int]
    grads: Tensor

    def forms(self) -> Iterator[Form]:
        """Each token's gradient."""
        for grad in self.grads:
            yield Materialized(grad)


@dataclass(frozen=True)
class Odd:
    """One token's gradient in another form."""

    side: int
    tokens: Sequence[int]
    form: Form

    def forms(self) -> Iterator[Form]:
        """The token's gradient."""
        yield self.form


Part = Shared | Lone | Flat | Odd


class TokenLedger:
    """Inner products of n_w chosen and n_l rejected tokens.

    Args:
        sizes: `(n_w, n_l)`.
        budget: bytes that the tiles of a reduction may take.

    Attributes:
        entries: parameter number -> its entries, in the order in which the parameters were completed, until taken.
    """

    def __init__(self, sizes: tuple[int, int], *, budget: int) -> None:
        self.entries: dict[int, Entries] = {}
        self._sizes = sizes
        self._budget = budget
        self._parts: dict[int, dict[Slot, list[Part]]] = defaultdict(lambda: defaultdict(list))
        self._ahead: dict[int, tuple[Entries, Tensor]] = {}

    def take(self) -> list[tuple[int, Entries]]:
        """The entries that are there by now, by parameter number; they are not kept."""
        taken, self.entries = list(self.entries.items()), {}
        return taken

    def add(self, param: int, slot: Slot, part: Part) -> None:
        """Add to what is known of a parameter.

        Args:
            param: its number.
            slot: what of it the part is the gradient of.
            part: the tokens' gradients, or a summand of them.
        """
        self._parts[param][slot].append(part)

    def shrink(self, param: int, ids: Tensor) -> None:
        """Reduce a tied head now, and keep only what its embedding, still to come, will meet.

        Args:
            param: the parameter's number; what has been added of it is `Lone`.
            ids: int64, every id that will be looked up.
        """
        slots = self._parts[param]
        parts = [part for part in slots[()] if isinstance(part, Lone)]
        if any(slot and held for slot, held in slots.items()) or len(parts) != len(slots[()]) or not _apart(parts):
            return
        ids = torch.unique(ids)
        lone = lone_entries([(part.side, part.tokens, part.u, part.v) for part in parts], self._sizes, self._budget)
        self._ahead[param] = lone, ids
        self._parts[param][()] = [Lone(part.side, part.tokens, part.u[:, ids], part.v) for part in parts]

    def finish(self, param: int) -> None:
        """Reduce a parameter, all of whose parts have been added; tokens without one have a zero gradient there.

        Args:
            param: its number.
        """
        slots = self._parts.pop(param, {})
        total = Entries(self._sizes)
        if param in self._ahead:
            ahead, ids = self._ahead.pop(param)
            total += ahead
            parts = slots[()]
            looked = [part for part in parts if isinstance(part, Shared)]
            merged = [part.block for part in _merged(looked)]
            lone = [(part.side, part.tokens, part.u, part.v) for part in parts if isinstance(part, Lone)]
            total += shared_entries(merged, self._sizes, self._budget)
            total += tied_entries(lone, merged, ids, self._sizes, self._budget)
        else:
            for parts in slots.values():
                entries = self._plain(parts)
                if entries is None:
                    total = self._general(slots)
                    break
                total += entries
        self.entries[param] = total

    def _plain(self, parts: Sequence[Part]) -> Entries | None:
        """Entries of a slot whose parts are of one kind; None where they are not."""
        if all(isinstance(part, Shared) for part in parts):
            shared = _merged([part for part in parts if isinstance(part, Shared)])
            alike = len({(part.looked_up, part.b_on_rows) for part in shared}) == 1
            if alike and _apart(shared):
                return shared_entries([part.block for part in shared], self._sizes, self._budget)
        if all(isinstance(part, Lone) for part in parts) and _apart(parts):
            lone = [(part.side, part.tokens, part.u, part.v) for part in parts if isinstance(part, Lone)]
            return lone_entries(lone, self._sizes, self._budget)
        if all(isinstance(part, Flat) for part in parts):
            flat = _added([part for part in parts if isinstance(part, Flat)])
            if _apart(flat):
                return flat_entries(
                    [(part.side, part.tokens, part.grads.reshape(len(part.grads), -1)) for part in flat],
                    self._sizes,
                    self._budget,
                )
        return None

    def _general(self, slots: dict[Slot, list[Part]]) -> Entries:
        """Any parts: gradients are formed in tiles. Rare (a weight used in several ways, experts)."""
        chosen, rejected = self._sizes
        wanted = Wanted.all(chosen + rejected)
        ledger = Ledger(wanted, budget=least_budget(self._budget, wanted.rows))
        for slot, parts in slots.items():
            for part in parts:
                for token, form in zip(part.tokens, part.forms(), strict=True):
                    ledger.add(0, token + part.side * chosen, slot, form)
        ledger.finish(0)
        ledger.close()
        matrix = wanted.matrix(ledger.entries[0].cpu())
        entries = Entries(self._sizes)
        entries.inner += matrix[:chosen, chosen:]
        entries.squares[0].add_(matrix.diagonal()[:chosen])
        entries.squares[1].add_(matrix.diagonal()[chosen:])
        return entries


def _apart(parts: Sequence[Part]) -> bool:
    """Whether every token occurs once."""
    tokens = [(part.side, token) for part in parts for token in part.tokens]
    return len(tokens) == len(set(tokens))


def _merged(parts: Sequence[Shared]) -> list[Shared]:
    """Uses of one weight by the same tokens, one after the other along their positions."""
    groups: dict[tuple[int, tuple[int, ...], bool, bool], list[Shared]] = defaultdict(list)
    for part in parts:
        groups[part.side, tuple(part.tokens), part.looked_up, part.b_on_rows].append(part)
    merged = []
    for same in groups.values():
        first = same[0]
        if len(same) > 1:
            b = torch.cat([part.block.b for part in same], 1)
            first = Shared(
                Block(first.side, first.tokens, b, torch.cat([part.block.a for part in same])), first.b_on_rows
            )
        merged.append(first)
    return merged


def _added(parts: Sequence[Flat]) -> list[Flat]:
    """Uses of one weight by the same tokens, summed."""
    groups: dict[tuple[int, tuple[int, ...]], Flat] = {}
    for part in parts:
        key = part.side, tuple(part.tokens)
        groups[key] = Flat(part.side, part.tokens, groups[key].grads + part.grads) if key in groups else part
    return list(groups.values())
