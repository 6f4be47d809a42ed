"""The result of a measurement: the Gram entries of one gradient per response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

__all__ = ["ModuleGram", "PairGram", "on_cpu", "sum_modules", "sum_parameters"]

ModuleGram = tuple[Tensor, Tensor, Tensor]
"""`(chosen_sq, rejected_sq, inner)` of one module, each float64 `[B]`."""


@dataclass(frozen=True, kw_only=True)
class PairGram:
    """Gram entries of `g_w = ∇_θ log π(y_w|x)` and `g_l = ∇_θ log π(y_l|x)` for B pairs.

    Log-probs are sums over completion tokens (nats), never means, and gradients are those of the sums: nothing is
    divided by the batch size. All tensors live on the CPU. Source: the paper's Section 3.1, equations (4) and (5).

    Attributes:
        chosen_sq: `‖g_w‖²`, float64 `[B]`.
        rejected_sq: `‖g_l‖²`, float64 `[B]`.
        inner: `⟨g_w, g_l⟩`, float64 `[B]`.
        chosen_logp: `log π(y_w|x)` in nats, float64 `[B]`.
        rejected_logp: `log π(y_l|x)` in nats, float64 `[B]`.
        chosen_len: completion tokens of the chosen response, int64 `[B]`.
        rejected_len: completion tokens of the rejected response, int64 `[B]`.
        coverage: share of the trainable parameters (by element count) that the entries include; 1.0 unless
            `allow_uncovered=True` was asked for.
        modules: `{module name: (chosen_sq, rejected_sq, inner)}`, summing to the totals; None unless `by_module=True`.
            A parameter shared by several modules is counted once, under the first of its names.
        uncovered: `{parameter name: reason}` for what the entries leave out; empty when `coverage` is 1.0.
    """

    chosen_sq: Tensor
    rejected_sq: Tensor
    inner: Tensor
    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    coverage: float = 1.0
    modules: Mapping[str, ModuleGram] | None = None
    uncovered: Mapping[str, str] = field(default_factory=dict)

    @property
    def cosine(self) -> Tensor:
        """`⟨g_w, g_l⟩ / (‖g_w‖ ‖g_l‖)`, float64 `[B]`; nan where a gradient is exactly zero."""
        return self.inner / (self.chosen_sq * self.rejected_sq).sqrt()

    def __len__(self) -> int:
        """Number of pairs, B."""
        return int(self.inner.shape[0])

    def select(self, pairs: Sequence[int]) -> PairGram:
        """The entries of some pairs.

        Args:
            pairs: pair numbers, in the order wanted; none is allowed.

        Returns:
            A `PairGram` of those pairs.
        """
        at = torch.tensor(list(pairs), dtype=torch.int64)
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values |= {name: value[at] for name, value in values.items() if isinstance(value, Tensor)}
        if self.modules is not None:
            values["modules"] = {name: tuple(part[at] for part in parts) for name, parts in self.modules.items()}
        return PairGram(**values)

    @classmethod
    def join(cls, grams: Sequence[PairGram]) -> PairGram:
        """The pairs of several measurements of one model, one after the other.

        Args:
            grams: at least one.

        Returns:
            A `PairGram` of all their pairs; `modules` where all have them, the least `coverage`.
        """
        names = [each.name for each in fields(cls) if isinstance(getattr(grams[0], each.name), Tensor)]
        modules: dict[str, ModuleGram] | None = None
        if all(gram.modules is not None for gram in grams):
            modules = {}
            for name in dict.fromkeys(name for gram in grams for name in gram.modules or {}):
                parts = [(gram.modules or {}).get(name, (torch.zeros_like(gram.inner),) * 3) for gram in grams]
                chosen_sq, rejected_sq, inner = (torch.cat(column) for column in zip(*parts, strict=True))
                modules[name] = (chosen_sq, rejected_sq, inner)
        return cls(
            **{name: torch.cat([getattr(gram, name) for gram in grams]) for name in names},
            coverage=min(gram.coverage for gram in grams),
            modules=modules,
            uncovered={name: why for gram in grams for name, why in gram.uncovered.items()},
        )


def sum_parameters(
    names: Sequence[str], parts: Sequence[tuple[Sequence[int], Mapping[int, Tensor]]], pairs: int
) -> dict[str, Tensor]:
    """Entries by module `[3, B]`, from `(pair numbers, {parameter number: [k, 3]})` of each group, float64."""
    owners = _owners(names)
    sums = torch.zeros(len(owners), pairs, 3, dtype=torch.float64)
    for numbers, entries in parts:
        if entries:
            shares = _by_module(owners, names, entries, 3 * len(numbers))
            sums[:, list(numbers)] += shares.view(len(owners), -1, 3)
    return dict(zip(owners, sums.mT, strict=True))


def sum_modules(names: Sequence[str], entries: Mapping[int, Tensor], count: int) -> dict[str, Tensor]:
    """Entries by module, float64 `[count]` on the CPU in the parameters' order, from entries by parameter number."""
    owners = _owners(names)
    return dict(zip(owners, _by_module(owners, names, entries, count), strict=True))


def _by_module(owners: Mapping[str, int], names: Sequence[str], entries: Mapping[int, Tensor], count: int) -> Tensor:
    """Sums over each module's parameters, float64 `[modules, count]` on the CPU."""
    sums = torch.zeros(len(owners), count, dtype=torch.float64)
    if entries:
        held = on_cpu({number: entries[number] for number in sorted(entries)})
        at = torch.tensor([owners[names[number].rpartition(".")[0]] for number in held])
        sums.index_add_(0, at, torch.stack(list(held.values())).flatten(1))
    return sums


def _owners(names: Sequence[str]) -> dict[str, int]:
    """Module name -> its place among the modules that hold parameters of these names."""
    return {name: place for place, name in enumerate(dict.fromkeys(name.rpartition(".")[0] for name in names))}


def on_cpu(entries: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Tensors of one shape on the CPU, in one copy a device: on a GPU every copy waits for all that is queued."""
    devices = {entry.device for entry in entries.values()} - {torch.device("cpu")}
    found = dict(entries)
    for device in devices:
        numbers = [number for number, entry in entries.items() if entry.device == device]
        found |= dict(zip(numbers, torch.stack([entries[number] for number in numbers]).cpu(), strict=True))
    return found
