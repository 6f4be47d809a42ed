"""Two CPU ranks: DDP gives the records of one process with the whole batch; FSDP2 gives exact entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradent.record.stream import read_stream
from tests.processes import launch
from tests.trainer import rank_ddp, rank_fsdp
from tests.trainer.rank_ddp import STEPS


def seen(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{rank}.json").read_text())


@pytest.mark.slow
def test_ddp(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("two", "bare", "one")}
    for folder in folders.values():
        folder.mkdir()
    launch(rank_ddp.main, 2, folders["two"], True, 2)
    launch(rank_ddp.main, 2, folders["bare"], False, 2)
    launch(rank_ddp.main, 1, folders["one"], True, 4)
    two, one = seen(folders["two"]), seen(folders["one"])
    assert two["weights"] == seen(folders["two"], 1)["weights"] == seen(folders["bare"])["weights"]
    assert two["sources"] == ["piggyback"] * STEPS
    assert [len(step) for step in two["cosines"]] == [4] * STEPS
    for name in ("cosines", "realised"):
        for step, (got, want) in enumerate(zip(two[name], one[name], strict=True)):
            tolerance = 1e-5 if step == 0 else 1e-3  # later steps have the two runs' own rounding in their weights
            assert sorted(got) == pytest.approx(sorted(want), abs=tolerance)
    # The gradient is all ranks', so that an account explains the same: of the other rank's rows, as one source.
    assert len(two["totals"]) == len(one["totals"]) == STEPS - 1
    for got, want in zip(two["totals"], one["totals"], strict=True):
        largest = max(map(abs, want))
        assert sorted(got) == pytest.approx(sorted(want), abs=2e-3 * largest)
    assert max(one["elsewhere"]) <= 1e-4 * min(two["elsewhere"])
    assert two["logs"][0]["gradent/cosine"] == pytest.approx(one["logs"][0]["gradent/cosine"], abs=1e-5)
    assert seen(folders["two"], 1)["cosines"] == []
    records = read_stream(folders["two"] / "records" / "pairs.jsonl")
    assert records["step"] == [step for step in range(1, STEPS + 1) for _ in range(4)]


@pytest.mark.slow
def test_fsdp2(tmp_path: Path) -> None:
    launch(rank_fsdp.main, 2, tmp_path)
    for rank in (0, 1):
        errors = seen(tmp_path, rank)
        assert len(errors) == 36
        assert {name: error for name, error in errors.items() if not error <= 5e-6} == {}
