"""Micro-batches and forwards: everything once, little padding, bounded size."""

from __future__ import annotations

import pytest
import torch

from gradent.hooks.passes.microbatch import FORWARD, TOKENS, WASTE, group_rows, micro_batches

CPU = torch.device("cpu")
LENGTHS = [(5, 9), (300, 280), (40, 2), (7, 7), (1000, 30), (33, 36), (6, 8), (5, 5)]


def test_every_pair_once_and_small_micro_batches() -> None:
    batches = micro_batches(LENGTHS, CPU)
    assert sorted(pair for batch in batches for pair in batch) == list(range(len(LENGTHS)))
    for batch in batches:
        tokens = sum(2 * max(LENGTHS[pair]) for pair in batch)
        assert len(batch) == 1 or tokens <= TOKENS["cpu"]
    assert max(map(len, batches)) > 1


def test_pairs_of_long_rows_make_smaller_micro_batches_on_a_cpu() -> None:
    sizes = {length: [len(batch) for batch in micro_batches([(length, length)] * 8, CPU)] for length in (64, 128, 400)}
    assert sizes == {64: [8], 128: [2, 2, 2, 2], 400: [1] * 8}
    assert len(micro_batches([(128, 128)] * 8, torch.device("cuda"))) == 1


@pytest.mark.parametrize("lengths", [[9], [5, 9], [300, 280], [7] * 64, [2, 3, 5, 8, 13, 21, 34, 55]])
def test_every_row_once_with_little_padding(lengths: list[int]) -> None:
    groups = group_rows(lengths, CPU)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        padded, real = max(lengths[row] for row in group) * len(group), sum(lengths[row] for row in group)
        assert len(group) == 1 or (padded <= WASTE * real and padded <= FORWARD["cpu"])


def test_rows_of_one_length_share_a_forward() -> None:
    assert group_rows([7, 7, 7, 7], CPU) == [[0, 1, 2, 3]]


def test_a_cpu_shares_forwards_between_short_rows_alone() -> None:
    assert [len(group) for group in group_rows([64] * 16, CPU)] == [8, 8]
    assert group_rows([300, 300], CPU) == [[0], [1]]
    assert len(group_rows([300] * 16, torch.device("cuda"))) == 1


def test_long_rows_fill_a_cpu_by_themselves() -> None:
    assert group_rows([110, 110], CPU, few=2) == [[0], [1]]
    assert group_rows([110, 110], CPU, few=1) == group_rows([90, 90], CPU, few=2) == [[0, 1]]
    assert group_rows([4000, 4000], torch.device("cuda"), few=2) == [[0, 1]]
