"""Collects every token's gradient, parameter by parameter, and reduces a parameter once it is complete.

The counterpart of `Ledger` for the token level: there a row has one gradient, here each of its tokens has one.

Letters: m tokens of a pass, M positions of its row, O and I the rows and columns of a slot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradent.hooks.uses.formats import Dense, Explicit, Form, Rows
from gradent.tokens.all_pairs import AllPairsLedger
from gradent.tokens.contractions import (
    Block,
    Entries,
    flat_entries,
    rank_one_entries,
    shared_entries,
    tied_entries,
)

__all__ = ["Gradients", "OtherForm", "Part", "RankOne", "SharedFactor", "TokenLedger"]

Slot = tuple[int, ...]


@dataclass(frozen=True)
class SharedFactor:
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
    def is_lookup(self) -> bool:
        """Whether the shared factor are ids."""
        return self.block.a.dtype == torch.int64

    def forms(self) -> Iterator[Form]:
        """Each token's gradient."""
        for b in self.block.b:
            if self.is_lookup:
                yield Rows(self.block.a, b)
            else:
                yield Dense(b, self.block.a) if self.b_on_rows else Dense(self.block.a, b)


@dataclass(frozen=True)
class RankOne:
    """`G_i = u_i v_iᵀ`, u `[m, O]`, v `[m, I]`: a use that each token reaches at its own position alone."""

    side: int
    tokens: Sequence[int]
    u: Tensor
    v: Tensor

    def forms(self) -> Iterator[Form]:
        """Each token's gradient."""
        for u, v in zip(self.u, self.v, strict=True):
            yield Dense(u[None], v[None])


@dataclass(frozen=True)
class Gradients:
    """The gradients themselves, `[m, *slot]`."""

    side: int
    tokens: Sequence[int]
    grads: Tensor

    def forms(self) -> Iterator[Form]:
        """Each token's gradient."""
        for grad in self.grads:
            yield Explicit(grad)


@dataclass(frozen=True)
class OtherForm:
    """One token's gradient in another form."""

    side: int
    tokens: Sequence[int]
    form: Form

    def forms(self) -> Iterator[Form]:
        """The token's gradient."""
        yield self.form


Part = SharedFactor | RankOne | Gradients | OtherForm


class TokenLedger:
    """Inner products of n_w chosen and n_l rejected tokens, reduced in tiles of `budget` bytes."""

    def __init__(self, sizes: tuple[int, int], *, budget: int) -> None:
        self.entries: dict[int, Entries] = {}  # by parameter number, in the order of completion, until popped
        self._sizes = sizes
        self._budget = budget
        self._parts: dict[int, dict[Slot, list[Part]]] = defaultdict(lambda: defaultdict(list))
        self._reduced_heads: dict[int, tuple[Entries, Tensor]] = {}

    def pop_entries(self) -> list[tuple[int, Entries]]:
        """The entries of the parameters completed since the last call, by parameter number."""
        entries, self.entries = list(self.entries.items()), {}
        return entries

    def add(self, param: int, slot: Slot, part: Part) -> None:
        """Add tokens' gradients of a slot, or a summand of them."""
        self._parts[param][slot].append(part)

    def reduce_head(self, param: int, ids: Tensor) -> None:
        """Reduce a tied head now, and keep only the rows that its embedding, still to come, will look up."""
        slots = self._parts[param]
        parts = [part for part in slots[()] if isinstance(part, RankOne)]
        is_mixed = any(slot and held for slot, held in slots.items()) or len(parts) != len(slots[()])
        if is_mixed or not _are_distinct(parts):
            return
        ids = torch.unique(ids)
        self._reduced_heads[param] = rank_one_entries(_factors(parts), self._sizes, self._budget), ids
        self._parts[param][()] = [RankOne(part.side, part.tokens, part.u[:, ids], part.v) for part in parts]

    def finish(self, param: int) -> None:
        """Reduce a parameter, all of whose parts have been added; tokens without one have a zero gradient there."""
        slots = self._parts.pop(param, {})
        total = Entries(self._sizes)
        if param in self._reduced_heads:
            head, ids = self._reduced_heads.pop(param)
            total += head
            lookups = [part.block for part in _joined([part for part in slots[()] if isinstance(part, SharedFactor)])]
            factors = _factors([part for part in slots[()] if isinstance(part, RankOne)])
            total += shared_entries(lookups, self._sizes, self._budget)
            total += tied_entries(factors, lookups, ids, self._sizes, self._budget)
        else:
            for parts in slots.values():
                entries = self._reduce_alike(parts)
                if entries is None:
                    total = self._reduce_any(slots)
                    break
                total += entries
        self.entries[param] = total

    def _reduce_alike(self, parts: Sequence[Part]) -> Entries | None:
        """Entries of a slot whose parts are of one kind; None where they are not."""
        if all(isinstance(part, SharedFactor) for part in parts):
            shared = _joined([part for part in parts if isinstance(part, SharedFactor)])
            is_alike = len({(part.is_lookup, part.b_on_rows) for part in shared}) == 1
            if is_alike and _are_distinct(shared):
                return shared_entries([part.block for part in shared], self._sizes, self._budget)
        if all(isinstance(part, RankOne) for part in parts) and _are_distinct(parts):
            factors = _factors([part for part in parts if isinstance(part, RankOne)])
            return rank_one_entries(factors, self._sizes, self._budget)
        if all(isinstance(part, Gradients) for part in parts):
            sums = _summed([part for part in parts if isinstance(part, Gradients)])
            if _are_distinct(sums):
                flat = [(part.side, part.tokens, part.grads.reshape(len(part.grads), -1)) for part in sums]
                return flat_entries(flat, self._sizes, self._budget)
        return None

    def _reduce_any(self, slots: dict[Slot, list[Part]]) -> Entries:
        """Entries of any parts, formed in tiles: rare (a weight used in several ways, experts)."""
        chosen, rejected = self._sizes
        ledger = AllPairsLedger(chosen + rejected, budget=self._budget)
        for slot, parts in slots.items():
            for part in parts:
                for token, form in zip(part.tokens, part.forms(), strict=True):
                    ledger.add(0, token + part.side * chosen, slot, form)
        ledger.finish(0)
        matrix = ledger.entries[0]
        entries = Entries(self._sizes)
        entries.inner += matrix[:chosen, chosen:]
        entries.squares[0].add_(matrix.diagonal()[:chosen])
        entries.squares[1].add_(matrix.diagonal()[chosen:])
        return entries


def _factors(parts: Sequence[RankOne]) -> list[tuple[int, Sequence[int], Tensor, Tensor]]:
    return [(part.side, part.tokens, part.u, part.v) for part in parts]


def _are_distinct(parts: Sequence[Part]) -> bool:
    """Whether every token occurs once."""
    tokens = [(part.side, token) for part in parts for token in part.tokens]
    return len(tokens) == len(set(tokens))


def _joined(parts: Sequence[SharedFactor]) -> list[SharedFactor]:
    """Uses of one weight by the same tokens, one after the other along their positions."""
    groups: dict[tuple[int, tuple[int, ...], bool, bool], list[Block]] = defaultdict(list)
    for part in parts:
        groups[part.side, tuple(part.tokens), part.is_lookup, part.b_on_rows].append(part.block)
    joined = []
    for (side, tokens, _, b_on_rows), blocks in groups.items():
        block = blocks[0]
        if len(blocks) > 1:
            b, a = torch.cat([block.b for block in blocks], 1), torch.cat([block.a for block in blocks])
            block = Block(side, tokens, b, a)
        joined.append(SharedFactor(block, b_on_rows))
    return joined


def _summed(parts: Sequence[Gradients]) -> list[Gradients]:
    """Uses of one weight by the same tokens, summed."""
    sums: dict[tuple[int, tuple[int, ...]], Gradients] = {}
    for part in parts:
        key = part.side, tuple(part.tokens)
        sums[key] = Gradients(part.side, part.tokens, sums[key].grads + part.grads) if key in sums else part
    return list(sums.values())
