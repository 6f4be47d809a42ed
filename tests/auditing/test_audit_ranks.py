"""An audit on two CPU ranks leaves the records of one process, and each rank did its share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradent.record import read_modules, read_pairs, read_steps, read_tokens
from tests.auditing import rank_audit
from tests.auditing.trained import train_run
from tests.processes import launch


def batches(path: Path) -> set[tuple[str, int]]:
    entries = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {(entry["of"], entry["number"]) for entry in entries if entry["kind"] == "batch"}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_two_ranks_leave_the_records_of_one(lora, tmp_path) -> None:
    trained = train_run(tmp_path / "trained", lora=lora, data_rows=12)
    outs = {ranks: tmp_path / f"by {ranks}" for ranks in (1, 2)}
    for ranks, out in outs.items():
        launch(rank_audit.main, ranks, trained.run, trained.pairs, trained.base, out)
    shares = [batches(path) for path in sorted((outs[2] / "journal").glob("*.jsonl"))]
    (whole,) = (batches(path) for path in (outs[1] / "journal").glob("*.jsonl"))
    assert len(shares) == 2 and shares[0] | shares[1] == whole and not shares[0] & shares[1]
    assert abs(len(shares[0]) - len(shares[1])) <= 3  # one a checkpoint
    readers: dict[str, Any] = {"pairs": read_pairs, "modules": read_modules, "tokens": read_tokens}
    for name, read in readers.items():
        one, two = (read(out / f"{name}.parquet").to_pydict() for out in outs.values())
        assert one == two, name
    one, two = (json.loads((out / "summary.json").read_text()) for out in outs.values())
    # The sample's gradient is added up in another order by two ranks.
    assert one.pop("steps") == close_to(two.pop("steps"))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    one, two = (read_steps(out / "steps.parquet").to_pydict() for out in outs.values())
    assert one == close_to(two)


@pytest.mark.slow
def test_a_rank_without_a_batch_meets_the_other_all_the_same(tmp_path) -> None:
    trained = train_run(tmp_path / "trained", lora=True, data_rows=4)
    outs = [tmp_path / f"by {ranks}" for ranks in (1, 2)]
    for ranks, out in enumerate(outs, 1):
        launch(rank_audit.main, ranks, trained.run, trained.pairs, trained.base, out, 8)
    one, two = (json.loads((out / "summary.json").read_text()) for out in outs)
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert len(one["steps"]["sample"]) == 3
    assert read_steps(outs[0] / "steps.parquet").equals(read_steps(outs[1] / "steps.parquet"))


def close_to(value: Any) -> Any:
    """What equals numbers to rounding, in whatever holds them."""
    if isinstance(value, dict):
        return {name: close_to(part) for name, part in value.items()}
    if isinstance(value, list):
        return [close_to(part) for part in value]
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
