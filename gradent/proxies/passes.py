"""Forwards of pairs that keep what enters and leaves the head, few pairs at a time.

Letters: B pairs, R rows of one forward, T tokens of a response, d the width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from gradent.errors import ModelError
from gradent.hooks.passes.microbatch import Row, group_rows, micro_batches
from gradent.model.facts import ignores_padding, require_causal, trims
from gradent.model.head import HeadPass, forward_heads
from gradent.model.parameters import check_ids, input_device
from gradent.pairs.batch import PairBatch

__all__ = ["pair_heads"]


@torch.no_grad()
def pair_heads(model: nn.Module, batch: PairBatch, *, slopes: bool) -> Iterator[dict[int, tuple[HeadPass, HeadPass]]]:
    """The heads of chosen and rejected by pair, a few pairs at a time; a model is `observed` by the caller."""
    device, count = input_device(model), len(batch)
    rows: list[Row] = [batch.row(row) for row in range(2 * count)]
    check_ids(model, torch.cat([ids for ids, _ in rows]))
    rows = [(ids.to(device), marks.to(device)) for ids, marks in rows]
    require_causal(model, rows[0][0])
    padded, trim = ignores_padding(model, rows[0][0]), trims(model, rows[0][0])
    lengths = [len(ids) for ids, _ in rows]
    for pairs in micro_batches([[lengths[pair], lengths[count + pair]] for pair in range(count)], device):
        members = [*pairs, *(count + pair for pair in pairs)]
        groups = (
            group_rows([lengths[row] for row in members], device) if padded else [[at] for at in range(len(members))]
        )
        heads: dict[int, HeadPass] = {}
        for group in groups:
            numbers = [members[at] for at in group]
            found = _forward(model, [rows[row] for row in numbers], trim=trim, slopes=slopes)
            heads.update(zip(numbers, found, strict=True))
        yield {pair: (heads[pair], heads[count + pair]) for pair in pairs}


def _forward(model: nn.Module, rows: list[Row], *, trim: bool, slopes: bool) -> list[HeadPass]:
    longest = max(len(ids) for ids, _ in rows)
    padded = [[nn.functional.pad(part, (0, longest - len(part))) for part in row] for row in rows]
    ids, marks = (torch.stack(column) for column in zip(*padded, strict=True))
    found = forward_heads(model, ids, marks, trim=trim, slopes=slopes)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} does not show what enters its head: stand-ins need a model with "
            "get_output_embeddings() that calls that module once a forward, as the causal language models of "
            "transformers do. gradent.measure needs neither."
        )
    return found
