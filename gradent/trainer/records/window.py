"""From step records to the plain window that alerts and panels are made from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from gradent.record import CASE_NAMES
from gradent.report.live.window import EntangledPair, TokenHeatMap, Window
from gradent.trainer.records.pushes import MOST_LETTERS, find_pushes
from gradent.trainer.records.step import (
    StepRecord,
    layer_cosines,
    moved_sources,
    share_explained,
    summarize_moves,
    summarize_nll,
)

__all__ = ["to_window"]

_MOST_PAIRS = 5


def to_window(records: Sequence[StepRecord], tokenizer: Any) -> Window:
    """The window of measured steps, in order; without a tokenizer it shows no pairs."""
    needs, ratios, predicted, realised = [], [], [], []
    inner: dict[str, float] = defaultdict(float)
    for record in records:
        verdict = record.verdict
        ratio, need = verdict.weight_ratio, verdict.chosen_needs
        falls = (verdict.case == 2) & ratio.isfinite() & need.isfinite()
        needs += need[falls].tolist()
        ratios += ratio[falls].tolist()
        predicted += list(zip(verdict.chosen_change.tolist(), verdict.rejected_change.tolist(), strict=True))
        if record.chosen_realised is not None and record.rejected_realised is not None:
            realised += list(zip(record.chosen_realised.tolist(), record.rejected_realised.tolist(), strict=True))
        for layer, (_, _, product) in record.layers.items():
            inner[layer] += float(product.sum())
    cosines = [layer_cosines([record]) for record in records]
    accounts = [record.attribution for record in records if record.attribution is not None]
    layers = [layer for layer in (records[0].layers if records else ()) if any(layer in step for step in cosines)]
    return Window(
        steps=[record.step for record in records], cases=[record.verdict.fractions() for record in records],
        pairs=[len(record.gram) for record in records], chosen_needs=needs, weight_ratio=ratios,
        layer_cosines={layer: [step.get(layer) for step in cosines] for layer in layers}, layer_inner=dict(inner),
        predicted=predicted, realised=realised if len(realised) == len(predicted) else (),
        moved=_find_moves(records), is_whole=all(account.is_whole for account in accounts),
        explained=share_explained(accounts),
        nll_weight=_find_weight(records),
        accounted=_totals(records) if accounts else (),
        pushes=[]
        if tokenizer is None
        else find_pushes(records, _name, lambda record, row: _response(record, row, tokenizer)),
        entangled=[] if tokenizer is None else _find_entangled(records, tokenizer),
        tokens=_make_heat_map(records, tokenizer),
    )  # fmt: skip


def _find_weight(records: Sequence[StepRecord]) -> tuple[float, float] | None:
    """The likelihood term with which chosen of unseen pairs would not have fallen, and its error."""
    found = summarize_nll([record.nll for record in records if record.nll is not None])
    names = [f"gradent/nll_weight/{name}" for name in ("unseen", "unseen_error")]
    return (found[names[0]], found[names[1]]) if all(name in found for name in names) else None


def _find_moves(records: Sequence[StepRecord]) -> dict[str, dict[str, list[float]]]:
    """Side -> source -> mean of each step, nan where a step has no account; empty where none has."""
    moved: dict[str, dict[str, list[float]]] = {}
    sources = moved_sources(record.attribution for record in records if record.attribution is not None)
    for record in records if sources else ():
        scalars = summarize_moves([] if record.attribution is None else [record.attribution])
        for side in ("chosen", "rejected"):
            for source in sources:
                value = scalars.get(f"gradent/moved/{side}/{source}", float("nan"))
                moved.setdefault(side, {}).setdefault(source, []).append(value)
    return moved


def _totals(records: Sequence[StepRecord]) -> list[tuple[float, float]]:
    """First-order changes of both log-probs, pair by pair; nan for the pairs of a step without an account."""
    totals = []
    for record in records:
        missing = torch.full((2, len(record.gram)), float("nan"), dtype=torch.float64)
        changes = missing if record.attribution is None else record.attribution.total.view(2, -1)
        totals += [(chosen, rejected) for chosen, rejected in changes.T.tolist()]
    return totals


def _name(record: StepRecord, row: int) -> str:
    pairs = len(record.gram)
    return f"{'chosen' if row < pairs else 'rejected'} of pair {row % pairs}"


def _response(record: StepRecord, row: int, tokenizer: Any) -> str:
    """The text of a row's response."""
    assert record.batch is not None
    ids, marks = record.batch.row(row)
    decode = getattr(tokenizer, "tokenizer", tokenizer).decode  # a processor holds its tokenizer
    return str(decode(ids[marks].tolist(), skip_special_tokens=True))[:MOST_LETTERS]


def _make_heat_map(records: Sequence[StepRecord], tokenizer: Any) -> TokenHeatMap | None:
    """The window's last token matrix."""
    record = next((record for record in reversed(records) if record.tokens is not None), None)
    if record is None or record.tokens is None:
        return None
    gram = record.tokens.gram
    decode = str if tokenizer is None else getattr(tokenizer, "tokenizer", tokenizer).decode
    chosen, rejected = (
        [f"{place} {decode(number)!r}" for place, number in enumerate(ids.tolist())]
        for ids in (gram.chosen_ids, gram.rejected_ids)
    )
    return TokenHeatMap(step=record.step, chosen=chosen, rejected=rejected, cosines=gram.cosine.tolist())


def _find_entangled(records: Sequence[StepRecord], tokenizer: Any) -> list[EntangledPair]:
    """The pairs with the largest cosine, with their text."""
    pairs = [
        (cosine, record, pair)
        for record in records
        if record.batch is not None
        for pair, cosine in enumerate(record.gram.cosine.tolist())
        if cosine == cosine
    ]
    decode = getattr(tokenizer, "tokenizer", tokenizer).decode  # a processor holds its tokenizer
    entangled = []
    for cosine, record, pair in sorted(pairs, key=lambda item: -item[0])[:_MOST_PAIRS]:
        assert record.batch is not None
        chosen, of_chosen = record.batch.row(pair)
        rejected, of_rejected = record.batch.row(len(record.batch) + pair)
        parts = {"prompt": chosen[~of_chosen], "chosen": chosen[of_chosen], "rejected": rejected[of_rejected]}
        texts = {name: decode(ids.tolist(), skip_special_tokens=True)[:MOST_LETTERS] for name, ids in parts.items()}
        case = CASE_NAMES[int(record.verdict.case[pair])]
        entangled.append(EntangledPair(step=record.step, cosine=cosine, case=case, **texts))
    return entangled
