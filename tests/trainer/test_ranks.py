"""Two CPU ranks: DDP gives the records of one process with the whole batch; FSDP2 gives exact entries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradent.record.stream import read_stream
from tests.processes import launch
from tests.trainer import rank_ddp, rank_fsdp
from tests.trainer.rank_ddp import STEPS


def seen(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{rank}.json").read_text())


def two_and_one(main: Callable[..., Any], folder: Path, kind: str) -> list[dict[str, Any]]:
    """What both of two ranks with 2 pairs each left, and one process with 4."""
    for name, ranks, batch in (("two", 2, 2), ("one", 1, 4)):
        (folder / name).mkdir()
        launch(main, ranks, folder / name, kind, batch)
    return [seen(folder / "two"), seen(folder / "two", 1), seen(folder / "one")]


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
def test_rows_of_two_ranks_meet_by_sketches(tmp_path: Path) -> None:
    """Without room for rows' gradients: other ranks are in the account where sketches have room, else in `rest`."""
    long = {"max_steps": 12, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    halved = {**long, "gradient_accumulation_steps": 2}
    runs = {
        "one": (1, True, 8, 2**16, long), "two": (2, True, 4, 1_200_000, long), "unwatched": (2, False, 4, None, long),
        "no room": (2, True, 4, 2**16, long), "accumulated": (2, True, 2, 1_200_000, halved),
    }  # fmt: skip
    found = {}
    for name, (ranks, watched, batch, budget, arguments) in runs.items():
        (tmp_path / name).mkdir()
        launch(rank_ddp.main, ranks, tmp_path / name, watched, batch, budget, arguments, 5)
        found[name] = seen(tmp_path / name)
    assert found["two"]["weights"] == found["unwatched"]["weights"]
    late = slice(-6, None)  # Adam's second moments have settled
    for name in ("two", "accumulated"):
        two = found[name]
        assert all(two["whole"]) and not any(two["left"])
        assert max(two["sketch_errors"]) <= 0.025
        assert two["logs"][-1]["gradent/sketch_error"] == pytest.approx(two["sketch_errors"][-1])
        for share, want in zip(two["explained"][late], found["one"]["explained"][late], strict=True):
            assert share == pytest.approx(want, abs=0.01)
        rests = [sum(rest**2 for rest in found[run]["rests"][late]) for run in (name, "no room")]
        assert rests[0] <= 0.25 * rests[1]
    assert not any(found["no room"]["whole"]) and found["no room"]["sketch_errors"] == [None] * 11


@pytest.mark.slow
def test_fsdp2(tmp_path: Path) -> None:
    launch(rank_fsdp.main, 2, tmp_path)
    for rank in (0, 1):
        errors = seen(tmp_path, rank)
        assert len(errors) == 36
        assert {name: error for name, error in errors.items() if not error <= 5e-6} == {}
