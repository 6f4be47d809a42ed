"""Two CPU ranks under engines that take parameters apart: the run is the same to the bit, and what is recorded true."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import launch
from tests.trainer import rank_deepspeed, rank_fsdp1
from tests.trainer.test_ranks import seen


@pytest.mark.slow
def test_fsdp_1(tmp_path: Path) -> None:
    launch(rank_fsdp1.main, 2, tmp_path)
    for rank in (0, 1):
        found = seen(tmp_path, rank)
        assert list(found) == list(rank_fsdp1.RUNS)
        for name, (bare, watched) in found.items():
            assert bare["kind"] == "FullyShardedDataParallel"
            assert (watched["weights"], watched["losses"]) == (bare["weights"], bare["losses"]), name
            assert (watched["records"], watched["errors"]) == (0, 0), name
            watching = [line for line in watched["said"] if "cannot watch this model" in line]
            assert len(watching) == 1 and "FSDP 1" in watching[0] and "FSDP 2" in watching[0], name
            assert set(watched["said"]) - set(watching) <= {
                "[gradent] probe_data is not measured: a model sharded by FSDP 1 allows no pass of gradent's own."
            }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(stage: int, tmp_path: Path) -> None:
    """With `scripts/clients/deepspeed.sh`, or wherever DeepSpeed is installed; it needs no GPU."""
    pytest.importorskip("deepspeed")
    names = [name for name, (number, *_) in rank_deepspeed.RUNS.items() if number == stage]
    launch(rank_deepspeed.main, 2, tmp_path, names)
    everything = [(rank, name, both) for rank in (0, 1) for name, both in seen(tmp_path, rank).items()]
    for rank, name, (bare, watched) in everything:
        assert (watched["weights"], watched["losses"]) == (bare["weights"], bare["losses"]), name
        assert watched["errors"] == 0, (name, watched["said"])
        records = watched["records"]
        if rank or name == "ZeRO-3, measure":  # rank 0 has the records of all
            assert records == []
            continue
        assert len(records) == rank_deepspeed.STEPS, (name, watched["said"])
        has_own_pass = name in ("ZeRO-2, a pass of its own", "ZeRO-2, measure")
        for record in records:
            assert record["source"] == ("measure" if has_own_pass else "piggyback"), name
            assert record["pairs"] == (8 if "accumulated" in name else 4), name
            is_half = name.endswith(("bf16", "fp16"))  # whose truth here is of the same weights in float32
            assert record["error"] <= (0.1 if is_half else 5e-6), (name, record)
            if record["realised"] is not None:
                assert record["realised"][0] <= 1e-3 and stage < 3, (name, record)
        if "a pass of its own" not in name:
            assert records[0]["d_w"] == pytest.approx([0.05] * len(records[0]["d_w"]), rel=2e-2), name
        if "realised" in rank_deepspeed.RUNS[name][1]:
            assert all((record["realised"] is None) == (stage == 3) for record in records), name
