"""Collects every token's gradient, parameter by parameter, and reduces a parameter once it is complete.

The counterpart of `Ledger` for the token level: there a row has one gradient, here each of its tokens has one.

Letters: m tokens of a pass, M positions of its row, O and I the rows and columns of a slot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import Factored, Form, Materialized, SparseRows
from gradent.kernels.common.budget import least_budget
from gradent.kernels.common.wanted import Wanted
from gradent.tokens.contractions import (
    Gradients,
    RankOne,
    SharedFactor,
    TokenEntries,
    gradient_entries,
    rank_one_entries,
    shared_entries,
    tied_entries,
)

__all__ = ["OtherForm", "Part", "TokenLedger"]

Slot = tuple[int, ...]


@dataclass(frozen=True)
class OtherForm:
    """One token's gradient in any form."""

    side: int
    tokens: Sequence[int]
    form: Form


Part = SharedFactor | RankOne | Gradients | OtherForm


class TokenLedger:
    """Inner products of n_w chosen and n_l rejected tokens, reduced in tiles of `budget` bytes."""

    def __init__(self, sizes: tuple[int, int], *, budget: int) -> None:
        self.entries: dict[int, TokenEntries] = {}  # by parameter number, in the order of completion, until popped
        self._sizes = sizes
        self._budget = budget
        self._parts: dict[int, dict[Slot, list[Part]]] = defaultdict(lambda: defaultdict(list))
        self._reduced_heads: dict[int, tuple[TokenEntries, Tensor]] = {}

    def pop_entries(self) -> list[tuple[int, TokenEntries]]:
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
        self._reduced_heads[param] = rank_one_entries(parts, self._sizes, self._budget), ids
        self._parts[param][()] = [replace(part, u=part.u[:, ids]) for part in parts]

    def finish(self, param: int) -> None:
        """Reduce a parameter, all of whose parts have been added; tokens without one have a zero gradient there."""
        slots = self._parts.pop(param, {})
        total = TokenEntries(self._sizes)
        if param in self._reduced_heads:
            head, ids = self._reduced_heads.pop(param)
            total += head
            lookups = _joined(slots[()])
            factors = [part for part in slots[()] if isinstance(part, RankOne)]
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

    def _reduce_alike(self, parts: Sequence[Part]) -> TokenEntries | None:
        """Entries of a slot whose parts are of one kind; None where they are not."""
        kinds = {type(part) for part in parts}
        if kinds == {SharedFactor}:
            shared = _joined(parts)
            if len({(part.is_lookup, part.b_on_rows) for part in shared}) == 1 and _are_distinct(shared):
                return shared_entries(shared, self._sizes, self._budget)
        elif kinds == {RankOne} and _are_distinct(parts):
            factors = [part for part in parts if isinstance(part, RankOne)]
            return rank_one_entries(factors, self._sizes, self._budget)
        elif kinds == {Gradients}:
            sums = _summed([part for part in parts if isinstance(part, Gradients)])
            if _are_distinct(sums):
                return gradient_entries(sums, self._sizes, self._budget)
        return None

    def _reduce_any(self, slots: dict[Slot, list[Part]]) -> TokenEntries:
        """Entries of any parts, formed in tiles: rare (a weight used in several ways, experts)."""
        chosen, rejected = self._sizes
        wanted = Wanted.all(chosen + rejected)
        ledger = Ledger(wanted, budget=least_budget(self._budget, wanted.rows))
        for slot, parts in slots.items():
            for part in parts:
                for token, form in zip(part.tokens, _forms(part), strict=True):
                    ledger.add(0, token + part.side * chosen, slot, form)
        ledger.finish(0)
        ledger.close()
        matrix, entries = wanted.matrix(ledger.entries[0].cpu()), TokenEntries(self._sizes)
        squares = matrix.diagonal().tensor_split([chosen])
        entries.put((slice(chosen), slice(rejected)), matrix[:chosen, chosen:], squares)
        return entries


def _forms(part: Part) -> Iterator[Form]:
    """Each token's gradient."""
    if isinstance(part, OtherForm):
        yield part.form
    elif isinstance(part, Gradients):
        yield from map(Materialized, part.grads)
    elif isinstance(part, RankOne):
        yield from (Factored(u[None], v[None]) for u, v in zip(part.u, part.v, strict=True))
    elif part.is_lookup:
        yield from (SparseRows(part.a, b) for b in part.b)
    else:
        yield from (Factored(b, part.a) if part.b_on_rows else Factored(part.a, b) for b in part.b)


def _are_distinct(parts: Sequence[Part]) -> bool:
    """Whether every token occurs once."""
    tokens = [(part.side, token) for part in parts for token in part.tokens]
    return len(tokens) == len(set(tokens))


def _joined(parts: Sequence[Part]) -> list[SharedFactor]:
    """The shared factors among some parts, those of the same tokens one after the other along their positions."""
    groups: dict[tuple[int, tuple[int, ...], bool, bool], list[SharedFactor]] = defaultdict(list)
    for part in [part for part in parts if isinstance(part, SharedFactor)]:
        groups[part.side, tuple(part.tokens), part.is_lookup, part.b_on_rows].append(part)
    return [
        replace(group[0], b=torch.cat([part.b for part in group], 1), a=torch.cat([part.a for part in group]))
        if len(group) > 1
        else group[0]
        for group in groups.values()
    ]


def _summed(parts: Sequence[Gradients]) -> list[Gradients]:
    """Uses of one weight by the same tokens, summed."""
    sums: dict[tuple[int, tuple[int, ...]], Gradients] = {}
    for part in parts:
        key = part.side, tuple(part.tokens)
        sums[key] = replace(part, grads=sums[key].grads + part.grads) if key in sums else part
    return list(sums.values())
