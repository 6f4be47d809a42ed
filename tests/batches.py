"""Small batches that hold what goes wrong in practice: ragged rows, one-token completions, padding on either side."""

from __future__ import annotations

import torch

from gradent.pairs.batch import PairBatch

# Token 0 is every tiny model's padding token; it stands in the text of the last pair, where it is a token like others.
PAIRS = (
    ([5, 17, 42, 8], [61, 9, 33, 70, 12, 88], [23]),
    ([31, 3], [44, 96, 7], [44, 15, 52, 29, 64, 11, 80, 38, 90, 4]),
    ([77, 0, 26, 50, 13, 91], [0, 68, 19, 35], [83, 57]),
)


def ragged(pairs: int = 3) -> PairBatch:
    """Up to 3 pairs, 6 to 12 tokens a row, right-padded; one completion has a single token."""
    return PairBatch.from_tokens(PAIRS[:pairs])


def square() -> PairBatch:
    """4 pairs of 6 tokens a row: once the first is set apart, as many rows as positions."""
    return PairBatch.from_tokens(
        [([5, 17, 42], [9, 33, 12], [12, 8, 51]), ([31, 77], [44, 96, 7, 61], [52, 3, 88, 90])]
        + [([64, 2, 18, 70], [23, 95], [81, 23]), ([15], [30, 83, 6, 74, 1], [49, 62, 27, 93, 38])]
    )


def uneven() -> PairBatch:
    """4 pairs: the shortest of tokens below 60; two of 22 tokens, 4 of them from 60 on, 3 in one row; one of 40."""
    long = list(range(3, 57, 3))
    return PairBatch.from_tokens(
        [([5, 17], [42, 9], [33, 12, 8]), ([31, 27], [61, 96, 77, 50], [52, 3, 28])]
        + [([24, 2, 18], [23, 35, 45], [21, 83]), ([15, 91], long, long[::-1])]
    )


def left_padded(batch: PairBatch) -> PairBatch:
    """The same pairs, padded on the left."""
    shifts = (batch.attention_mask == 0).sum(1).tolist()
    parts = (batch.input_ids, batch.attention_mask, batch.completion_mask)
    return PairBatch(*(torch.stack([row.roll(n) for row, n in zip(part, shifts, strict=True)]) for part in parts))
