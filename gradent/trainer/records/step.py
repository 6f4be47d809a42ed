"""What is kept of one measured step, and the scalars that a window of steps is logged as.

Letters: k pairs of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from gradent.attribution.likelihood import NLLEffect, needed_weight
from gradent.attribution.step import StepAttribution, join_errors
from gradent.model.layer_names import group_layers
from gradent.pair_gram import ModuleGram, PairGram
from gradent.pairs.batch import PairBatch
from gradent.proxies import PairProxies
from gradent.record import MOVED_COLUMNS, MOVED_SOURCES, PAIR_COLUMNS, UNSPLIT
from gradent.record.table import Table
from gradent.recorder.recording import Recording
from gradent.row_gram import RowGram
from gradent.theory.conditions import CASES, Verdict
from gradent.trainer.records.proxies import summarize_proxies
from gradent.trainer.records.token_map import TokenMap

__all__ = [
    "LARGE", "StepRecord", "case_shares", "finite_means", "gram_values", "layer_cosines", "moved_sources",
    "share_explained", "summarize", "summarize_moves", "summarize_nll", "to_rows",
]  # fmt: skip


LARGE = 64
"""Rows from which on a thousand records of their products would take more than some tens of MB."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One measured optimizer step.

    Attributes:
        step: number of the step, counted from 1.
        gram: Gram entries of the step's k active pairs, all micro-batches and ranks together.
        verdict: with the trainer's own weights.
        source: "piggyback" or "measure".
        overhead_s: wall time of gradent in the step, in seconds, summed over ranks.
        inactive: pairs that the loss did not move.
        unpaired: rows that found no partner (KTO).
        layers: `{layer: (chosen_sq, rejected_sq, inner)}`, float64 `[k]` each: the modules, summed by layer.
        batch: the pairs' tokens; None for a reward model.
        chosen_realised: how much `log π(y_w|x)` moved with the optimizer's step, float64 `[k]`; None unless asked for.
        rejected_realised: the same for rejected.
        tokens: the token matrix of the most entangled pair; None unless asked for.
        attribution: what moved each of these responses in the step, in the order of `gram`; None without
            `attribution=True`, in Adam's first step, and where a step has no such account (said once in the log).
        unseen: first-order change, in nats, of chosen and rejected of a pair that is not in the step, each with its
            standard error, float64 `[2, 2]`; None where it is not known (docs/account.md says when it is).
        nll: what a likelihood term on chosen would add to the step, and so how much of it would have been enough
            (`gradent.attribution.likelihood`); None where the account does not tell.
        proxies: the cheap stand-ins of these pairs, in the order of `gram`; None without `proxies=True`.
    """

    step: int
    gram: PairGram
    verdict: Verdict
    source: Literal["piggyback", "measure"]
    overhead_s: float
    inactive: int
    unpaired: int
    layers: dict[str, ModuleGram]
    batch: PairBatch | None = None
    chosen_realised: Tensor | None = None
    rejected_realised: Tensor | None = None
    tokens: TokenMap | None = None
    attribution: StepAttribution | None = None
    unseen: Tensor | None = None
    nll: NLLEffect | None = None
    proxies: PairProxies | None = None

    @classmethod
    def of(
        cls, step: int, recording: Recording, *, realised: Tensor | None = None, tokens: TokenMap | None = None
    ) -> StepRecord:
        """The record of a recording.

        Args:
            step: number of the step.
            recording: what was harvested, with modules.
            realised: how much chosen and rejected log-probs moved with the optimizer's step, `[2, k]`.
            tokens: the token matrix of the most entangled pair.

        Returns:
            The record.
        """
        chosen_realised, rejected_realised = (None, None) if realised is None else realised.unbind(0)
        names = ("gram", "verdict", "source", "overhead_s", "inactive", "unpaired", "batch")
        attribution = recording.attribution
        if attribution is not None:  # of its sketches nothing is left to be learnt
            moved = attribution.realised if realised is None else realised.flatten()
            attribution = replace(attribution, realised=moved, sketch=None)
        return cls(
            **{name: getattr(recording, name) for name in names}, step=step,
            layers=group_layers(recording.gram.modules or {}), chosen_realised=chosen_realised,
            rejected_realised=rejected_realised, tokens=tokens, attribution=attribution,
        )  # fmt: skip

    @cached_property
    def rows(self) -> RowGram:
        """The step's 2k responses as rows, chosen first, each pair a group; nan between responses of other pairs.

        `moved` has the sources of pairs (own, partner, others_chosen, ...), `weight` is `d_w` and `−d_l` (each pair's
        own loss: not divided by the number of pairs).
        """
        pairs, verdict = len(self.gram), self.verdict
        products = torch.full((2 * pairs, 2 * pairs), float("nan"), dtype=torch.float64)
        products.diagonal()[:] = torch.cat([self.gram.chosen_sq, self.gram.rejected_sq])
        for offset in (pairs, -pairs) if pairs else ():
            products.diagonal(offset)[:] = self.gram.inner
        realised = (self.chosen_realised, self.rejected_realised)
        return RowGram(
            products=products, logp=torch.cat([self.gram.chosen_logp, self.gram.rejected_logp]),
            length=torch.cat([self.gram.chosen_len, self.gram.rejected_len]), group=torch.arange(pairs).repeat(2),
            coverage=self.gram.coverage, weight=torch.cat([verdict.d_w, -verdict.d_l]),
            moved=None if self.attribution is None else self.attribution.moved,
            realised=None if realised[0] is None or realised[1] is None else torch.cat([realised[0], realised[1]]),
        )  # fmt: skip

    def without_modules(self) -> StepRecord:
        """The same without each module's share."""
        return replace(self, gram=replace(self.gram, modules=None))

    def without_large_matrices(self) -> StepRecord:
        """The same without the `[N, N]` matrices of an attribution of more than `LARGE` rows."""
        if self.attribution is None or len(self.attribution.products) <= LARGE:
            return self
        nothing = torch.zeros(0, 0, dtype=torch.float64)
        return replace(self, attribution=replace(self.attribution, products=nothing, pushes=nothing))


def finite_means(values: Mapping[str, Tensor], prefix: str) -> dict[str, float]:
    """`{prefix + name: mean of the finite values}`, without the names that have none."""
    finite = {name: tensor[tensor.isfinite()] for name, tensor in values.items()}
    return {f"{prefix}{name}": float(tensor.mean()) for name, tensor in finite.items() if len(tensor)}


def gram_values(gram: PairGram) -> dict[str, Tensor]:
    """What is logged of Gram entries, `[k]` each."""
    norms = {"chosen_norm": gram.chosen_sq.sqrt(), "rejected_norm": gram.rejected_sq.sqrt()}
    return {"inner": gram.inner, "cosine": gram.cosine, **norms}


def case_shares(case: Tensor, prefix: str) -> dict[str, float]:
    """The share of pairs in each active case, from case numbers `[k]`."""
    return {f"{prefix}{name}": float((case == number).double().mean()) for number, name in CASES.items() if number}


def summarize(records: Sequence[StepRecord]) -> dict[str, float]:
    """The `gradent/...` scalars of a window of at least one measured step: means over its active pairs."""
    gram = PairGram.join([record.gram for record in records])
    inactive = sum(record.inactive for record in records)
    scalars = {
        "gradent/inactive": inactive / max(1, inactive + len(gram)), "gradent/coverage": gram.coverage,
        "gradent/overhead_s": sum(record.overhead_s for record in records) / len(records),
    }  # fmt: skip
    if not len(gram):
        return scalars
    names = ("chosen_change", "rejected_change", "weight_ratio", "case")
    verdict = {name: torch.cat([getattr(record.verdict, name) for record in records]) for name in names}
    case, values = verdict.pop("case"), verdict | gram_values(gram)
    for name in ("chosen_realised", "rejected_realised"):
        parts = [getattr(record, name) for record in records if getattr(record, name) is not None]
        if parts:
            values[name] = torch.cat(parts)
    scalars |= finite_means(values, "gradent/") | case_shares(case, "gradent/case/")
    scalars |= _summarize_band([record.verdict for record in records])
    scalars |= summarize_proxies([(record.gram, record.proxies) for record in records if record.proxies is not None])
    scalars |= _summarize_unseen([record.unseen for record in records if record.unseen is not None])
    scalars |= summarize_nll([record.nll for record in records if record.nll is not None])
    return scalars | summarize_moves([part for part in (record.attribution for record in records) if part is not None])


def _summarize_band(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The `gradent/band/...` scalars: medians of Condition 2's bounds on d_w/d_l, over the pairs that both bind."""
    bounds = [torch.cat([getattr(each, name) for each in verdicts]) for name in ("chosen_needs", "rejected_needs")]
    low, high = (each[(bounds[0] > 0) & bounds[1].isfinite()] for each in bounds)
    return {"gradent/band/low": float(low.median()), "gradent/band/high": float(high.median())} if len(low) else {}


def _summarize_unseen(found: Sequence[Tensor]) -> dict[str, float]:
    """The `gradent/unseen/...` scalars: means over steps, and their standard errors."""
    scalars: dict[str, float] = {}
    for place, side in enumerate(("chosen", "rejected")) if found else ():
        changes, errors = torch.stack(list(found))[:, place].unbind(1)
        scalars[f"gradent/unseen/{side}"] = float(changes.mean())
        scalars[f"gradent/unseen/{side}_error"] = float(errors.square().sum().sqrt()) / len(found)
    return scalars


def summarize_nll(effects: Sequence[NLLEffect]) -> dict[str, float]:
    """The `gradent/nll_weight/...` scalars: the smallest weight of a likelihood term that would have been enough."""
    if not effects:
        return {}
    scalars: dict[str, float] = {}
    for name in ("batch", "unseen"):
        weight, error = needed_weight(effects, unseen=name == "unseen")
        scalars |= {f"gradent/nll_weight/{name}": weight, f"gradent/nll_weight/{name}_error": error}
    return {name: value for name, value in scalars.items() if value == value}


def moved_sources(parts: Iterable[StepAttribution]) -> list[str]:
    """The sources that some accounts have, in the order of tables and panels."""
    found = {source for part in parts for source in part.moved}
    return [source for source in (*MOVED_SOURCES, UNSPLIT) if source in found]


def summarize_moves(parts: Sequence[StepAttribution]) -> dict[str, float]:
    """The `gradent/moved/...` scalars of some steps, means over their responses, and the share that is explained."""
    scalars: dict[str, float] = {}
    found = moved_sources(parts)
    for place, side in enumerate(("chosen", "rejected")) if parts else ():
        values = {
            source: torch.cat([part.moved[source].view(2, -1)[place] for part in parts if source in part.moved])
            for source in found
        }
        scalars |= finite_means(values, f"gradent/moved/{side}/")
    error = join_errors(parts)
    if error is not None:
        scalars["gradent/sketch_error"] = error
    explained = share_explained(parts)
    return scalars if explained is None else scalars | {"gradent/explained": explained}


def share_explained(parts: Sequence[StepAttribution]) -> float | None:
    """Share of the realised changes' variance (against zero) that some steps' accounts explain; None if unknown."""
    realised = [part.realised for part in parts if part.realised is not None]
    rests = [part.rest for part in parts if part.rest is not None]
    moved = sum(float(part.square().sum()) for part in realised)
    return 1 - sum(float(rest.square().sum()) for rest in rests) / moved if moved > 0 else None


def layer_cosines(records: Iterable[StepRecord]) -> dict[str, float]:
    """`{layer: mean over a window's pairs of the cosine in that layer alone}`."""
    cosines: dict[str, list[Tensor]] = {}
    for record in records:
        for layer, (chosen_sq, rejected_sq, inner) in record.layers.items():
            cosines.setdefault(layer, []).append(inner / (chosen_sq * rejected_sq).sqrt())
    return finite_means({layer: torch.cat(parts) for layer, parts in cosines.items()}, "")


def _moved_columns(record: StepRecord) -> dict[str, Any]:
    """Column of `MOVED_COLUMNS` to `[k]`, of those that were measured."""
    changes = {"chosen_realised": record.chosen_realised, "rejected_realised": record.rejected_realised}
    for source, values in ({} if record.attribution is None else record.attribution.moved).items():
        changes |= dict(zip((f"chosen_moved_{source}", f"rejected_moved_{source}"), values.view(2, -1), strict=True))
    return {name: values.numpy() for name, values in changes.items() if values is not None}


def to_rows(record: StepRecord) -> list[dict[str, Any]]:
    """A step's pairs as rows of the record's schema (`PAIR_COLUMNS`, `MOVED_COLUMNS`), without a reference."""
    pairs, sources = len(record.gram), (record.gram, record.verdict)
    names = [(source, name) for source in sources for name in PAIR_COLUMNS if hasattr(source, name)]
    table = Table({name: getattr(source, name).numpy() for source, name in names})
    columns = dict.fromkeys([*PAIR_COLUMNS, *MOVED_COLUMNS], [None] * pairs) | table.to_lists()
    columns |= Table(_moved_columns(record)).to_lists()
    columns |= {"checkpoint": ["train"] * pairs, "step": [record.step] * pairs, "pair": list(range(pairs))}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
