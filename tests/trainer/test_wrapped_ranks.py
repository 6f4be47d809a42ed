"""Two CPU ranks under engines that take parameters apart: the run is the same to the bit, and what is recorded true."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import launch
from tests.trainer import rank_fsdp1
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
                "probe_data is not measured: a model sharded by FSDP 1 allows no pass of gradent's own."
            }
