"""Ranks that would measure different things are refused before the first batch, with what differs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest

from gradent.auditing.state.agreement import Settings
from gradent.distributed import Ranks
from gradent.errors import InputError
from tests.auditing import rank_audit
from tests.auditing.made import tokenized
from tests.auditing.trained import train_run
from tests.processes import launch

PAIRS = [tokenized(row, [1, 2], [3, row + 4], [9]) for row in range(4)]
SAME = Settings(
    versions=["0.1", "2.13"], measuring=[8, None, "hooks"], device="cpu", is_in_place=False, pairs=PAIRS
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Meeting(Ranks):
    """Two ranks, the other of which says what another audit's settings would."""

    other: Settings
    world: int = 2

    def gather(self, values: list[Any]) -> list[Any]:
        return [*values, self.other.told()]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "torch": ({"versions": ["0.1", "2.12"]}, "versions of gradent and torch ['0.1', '2.13'] on rank 0 and ['0.1', '2."),
    "device": ({"device": "cuda"}, "kind of device 'cpu' on rank 0 and 'cuda' on rank 1. Nothing was measured."),
    "rows": ({"pairs": PAIRS[1:]}, "rank 0 drew 4 rows of the data and rank 1 other ones (3)"),
    "tokens": (
        {"pairs": [*PAIRS[:2], *(tokenized(row, [1, 7], [3], [9]) for row in (2, 3))]},
        "2 of 4 pairs have other token ids on rank 1 than on rank 0, pairs.jsonl:3 the first (does the chat template",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_differs_is_said(what) -> None:
    fields, message = OTHERS[what]
    other = replace(SAME, **fields)
    assert other.key != SAME.key
    with pytest.raises(InputError, match=re.escape(message)):
        SAME.agree(Meeting(other=other))


def test_ranks_that_agree_go_on() -> None:
    SAME.agree(Meeting(other=replace(SAME)))
    SAME.agree(Ranks())


@pytest.mark.slow
def test_two_ranks_with_other_tokens_measure_nothing(tmp_path) -> None:
    trained = train_run(tmp_path / "trained", lora=True, data_rows=12)
    with pytest.raises(pytest.fail.Exception, match="12 of 12 pairs have other token ids on rank 1 than on rank 0"):
        launch(rank_audit.apart, 2, trained.run, trained.pairs, trained.base, tmp_path / "out")
    assert not (tmp_path / "out/summary.json").exists()
    assert not list((tmp_path / "out/journal").glob("*.jsonl"))
