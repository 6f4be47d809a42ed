"""From step records to the plain window that words and panels are made from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from gradent.record import CASE_NAMES
from gradent.report.live.window import EntangledPair, TokenHeatMap, Window
from gradent.trainer.callback.step import StepRecord, layer_cosines

__all__ = ["to_window"]

_SHOWN = 5
_LETTERS = 2000


def to_window(records: Sequence[StepRecord], tokenizer: Any) -> Window:
    """The window of some records.

    Args:
        records: measured steps, in order.
        tokenizer: decodes the pairs that are shown; None to leave them out.

    Returns:
        The window.
    """
    needs, ratios, predicted, realised = [], [], [], []
    inner: dict[str, float] = defaultdict(float)
    cosines: dict[str, list[float | None]] = {}
    for number, record in enumerate(records):
        down = (record.verdict.case == 2) | (record.verdict.case == 4)
        ratio, need = record.verdict.weight_ratio, record.verdict.chosen_needs
        use = down & ratio.isfinite() & need.isfinite()
        needs += need[use].tolist()
        ratios += ratio[use].tolist()
        predicted += list(
            zip(record.verdict.chosen_change.tolist(), record.verdict.rejected_change.tolist(), strict=True)
        )
        if record.chosen_realised is not None and record.rejected_realised is not None:
            realised += list(zip(record.chosen_realised.tolist(), record.rejected_realised.tolist(), strict=True))
        for layer, (_, _, product) in record.layers.items():
            inner[layer] += float(product.sum())
        of_step = layer_cosines([record])
        for layer in {*cosines, *of_step}:
            cosines.setdefault(layer, [None] * number).append(of_step.get(layer))
    order = [layer for record in records[:1] for layer in record.layers]
    return Window(
        steps=[record.step for record in records],
        cases=[
            record.verdict.fractions() if len(record.gram) else dict.fromkeys(CASE_NAMES.values(), 0.0)
            for record in records
        ],
        pairs=[len(record.gram) for record in records],
        chosen_needs=needs,
        weight_ratio=ratios,
        layer_cosines={layer: cosines[layer] for layer in sorted(cosines, key=order.index) if layer in order},
        layer_inner=dict(inner),
        predicted=predicted,
        realised=realised if len(realised) == len(predicted) else (),
        entangled=[] if tokenizer is None else _entangled(records, tokenizer),
        tokens=_heat_map(records, tokenizer),
    )


def _heat_map(records: Sequence[StepRecord], tokenizer: Any) -> TokenHeatMap | None:
    maps = [(record.step, record.tokens.gram) for record in records if record.tokens is not None]
    if not maps:
        return None
    step, gram = maps[-1]
    decode = str if tokenizer is None else getattr(tokenizer, "tokenizer", tokenizer).decode

    def texts(ids: list[int]) -> list[str]:
        return [f"{place} {decode(number)!r}" for place, number in enumerate(ids)]

    return TokenHeatMap(
        step=step,
        chosen=texts(gram.chosen_ids.tolist()),
        rejected=texts(gram.rejected_ids.tolist()),
        cosines=[[None if value != value else value for value in row] for row in gram.cosine.tolist()],
    )


def _entangled(records: Sequence[StepRecord], tokenizer: Any) -> list[EntangledPair]:
    ranked = sorted(
        (
            (cosine, record, pair)
            for record in records
            if record.batch is not None
            for pair, cosine in enumerate(record.gram.cosine.tolist())
            if cosine == cosine
        ),
        key=lambda item: -item[0],
    )[:_SHOWN]
    decode = getattr(tokenizer, "tokenizer", tokenizer).decode  # a processor holds its tokenizer
    shown = []
    for cosine, record, pair in ranked:
        assert record.batch is not None
        (chosen, of_chosen), (rejected, of_rejected) = (
            record.batch.row(row) for row in (pair, len(record.batch) + pair)
        )
        texts = [
            decode(ids.tolist())[:_LETTERS] for ids in (chosen[~of_chosen], chosen[of_chosen], rejected[of_rejected])
        ]
        case = CASE_NAMES[int(record.verdict.case[pair])]
        shown.append(
            EntangledPair(
                step=record.step, cosine=cosine, case=case, prompt=texts[0], chosen=texts[1], rejected=texts[2]
            )
        )
    return shown
