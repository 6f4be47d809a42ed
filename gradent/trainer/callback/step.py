"""What is kept of one measured step, and the scalars that a window of steps is logged as.

Letters: k pairs of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradent.model.layer_names import group_layers
from gradent.pair_gram import ModuleGram, PairGram
from gradent.pairs.batch import PairBatch
from gradent.record import PAIR_COLUMNS
from gradent.recorder import Recording
from gradent.theory.conditions import Verdict
from gradent.trainer.callback.token_map import TokenMap

__all__ = ["StepRecord", "layer_cosines", "summarize", "to_rows"]


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

    @classmethod
    def of(cls, step: int, one: Recording) -> StepRecord:
        """The record of a recording.

        Args:
            step: number of the step.
            one: what was harvested, with modules.

        Returns:
            The record.
        """
        return cls(
            step=step,
            gram=one.gram,
            verdict=one.verdict,
            source=one.source,
            overhead_s=one.overhead_s,
            inactive=one.inactive,
            unpaired=one.unpaired,
            layers=group_layers(one.gram.modules or {}),
            batch=one.batch,
        )


def summarize(records: Sequence[StepRecord]) -> dict[str, float]:
    """The scalars of a window of measured steps, under the names of the dashboard.

    Args:
        records: the window, at least one.

    Returns:
        Means over the window's active pairs, `gradent/...` each; shares for the cases and for `inactive`; no key where
        nothing can be averaged (no active pair, no finite ratio).
    """
    gram = PairGram.join([record.gram for record in records])
    verdicts = [record.verdict for record in records]
    pairs = len(gram)
    inactive = sum(record.inactive for record in records)
    scalars = {
        "gradent/inactive": inactive / max(1, inactive + pairs),
        "gradent/coverage": gram.coverage,
        "gradent/overhead_s": sum(record.overhead_s for record in records) / len(records),
    }
    if not pairs:
        return scalars
    whole = {name: torch.cat([getattr(one, name) for one in verdicts]) for name in ("chosen_change", "rejected_change")}
    whole["weight_ratio"] = torch.cat([one.weight_ratio for one in verdicts])
    whole |= {"inner": gram.inner, "cosine": gram.cosine}
    whole |= {"chosen_norm": gram.chosen_sq.sqrt(), "rejected_norm": gram.rejected_sq.sqrt()}
    for name in ("chosen_realised", "rejected_realised"):
        parts = [getattr(record, name) for record in records if getattr(record, name) is not None]
        if parts:
            whole[name] = torch.cat(parts)
    for name, values in whole.items():
        finite = values[values.isfinite()]
        if len(finite):
            scalars[f"gradent/{name}"] = float(finite.mean())
    shares = [one.fractions() for one in verdicts if len(one.case)]
    weights = [len(one.case) for one in verdicts if len(one.case)]
    for name in ("ideal", "both_down", "both_up", "reversed"):
        total = sum(share[name] * weight for share, weight in zip(shares, weights, strict=True))
        scalars[f"gradent/case/{name}"] = total / pairs
    return scalars


def layer_cosines(records: Iterable[StepRecord]) -> dict[str, float]:
    """Mean cosine of each layer over a window.

    Args:
        records: the window.

    Returns:
        `{layer: mean over pairs of inner / (‖g_w‖‖g_l‖), all three of that layer alone}`.
    """
    cosines: dict[str, list[Tensor]] = defaultdict(list)
    for record in records:
        for layer, (chosen_sq, rejected_sq, inner) in record.layers.items():
            cosines[layer].append(inner / (chosen_sq * rejected_sq).sqrt())
    means = {layer: torch.cat(parts) for layer, parts in cosines.items()}
    finite = {layer: values[values.isfinite()] for layer, values in means.items()}
    return {layer: float(values.mean()) for layer, values in finite.items() if len(values)}


def to_rows(record: StepRecord) -> list[dict[str, Any]]:
    """A step's pairs as rows of the record's schema (`PAIR_COLUMNS`), without a reference.

    Args:
        record: the step.

    Returns:
        One dict a pair; `pair` is its place in the step's batch.
    """
    columns: dict[str, list[Any]] = {name: [None] * len(record.gram) for name in PAIR_COLUMNS}
    for source in (record.gram, record.verdict):
        columns |= {name: getattr(source, name).tolist() for name in PAIR_COLUMNS if hasattr(source, name)}
    columns["cosine"] = [None if value != value else value for value in columns["cosine"]]
    columns["checkpoint"] = ["train"] * len(record.gram)
    columns["step"] = [record.step] * len(record.gram)
    columns["pair"] = list(range(len(record.gram)))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
