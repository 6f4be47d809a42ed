"""kill -9 at any moment: started again, a scan ends with the rows of an undisturbed one; two ranks with one's rows."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradent import scan
from gradent.record.scans import read_scan
from tests import processes
from tests.auditing.made import write_jsonl
from tests.auditing.trained import make_base, word_pairs

KILLS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("killed")
    return make_base(folder / "base"), write_jsonl(folder / "pairs.jsonl", word_pairs(24))


def go(model: str, pairs: str, out: str) -> None:
    """The scan, in a process of its own."""
    torch.set_num_threads(1)
    scan(model, pairs, out=out, batch_size=1, exact=8, report=False, quiet=True, device="cpu")


def on_a_rank(model: str, pairs: str, out: str) -> None:
    """The same on a rank of a launcher."""
    go(model, pairs, out)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's destructor can hang


def rows(out: Path) -> bytes:
    return (out / "scan.parquet").read_bytes()


def lines_in(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("journal/*.jsonl"))


@pytest.mark.slow
def test_killed_at_random_moments(files, tmp_path) -> None:
    whole = processes.start(go, *map(str, files), str(tmp_path / "whole"))
    whole.join()
    assert whole.exitcode == 0
    total = lines_in(tmp_path / "whole")
    chance, lines, killed = random.Random(0), [0], 0
    for _ in range(4 * KILLS):
        process = processes.start(go, *map(str, files), str(tmp_path / "out"))
        moment = lines[-1] + chance.randrange(total // KILLS)
        while process.is_alive() and lines_in(tmp_path / "out") < moment:
            time.sleep(0.005)
        process.join(chance.uniform(0, 0.1))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        lines.append(lines_in(tmp_path / "out"))
        if killed == KILLS or process.exitcode == 0:
            break
    assert killed >= 2 and len(set(lines)) > 2, (killed, lines)  # the kills fell into the work, and it went on
    last = processes.start(go, *map(str, files), str(tmp_path / "out"))
    last.join()
    assert last.exitcode == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
    assert np.array_equal(*(np.load(tmp_path / name / "effects.npy") for name in ("out", "whole")))
    entries = [
        json.loads(line)
        for path in (tmp_path / "out/journal").glob("*.jsonl")
        for line in path.read_text().splitlines()[1:]
    ]
    found: list[Any] = [(entry["of"], entry["number"]) for entry in entries if entry["kind"] == "scan"]
    assert sorted(number for _, number in found) == [*range(24)]  # none lost, none doubled


@pytest.mark.slow
def test_two_ranks_leave_the_rows_of_one(files, tmp_path) -> None:
    for ranks in (1, 2):
        processes.launch(on_a_rank, ranks, *map(str, files), str(tmp_path / f"by {ranks}"))
    assert rows(tmp_path / "by 1") == rows(tmp_path / "by 2")
    shares = [
        {json.loads(line)["number"] for line in path.read_text().splitlines()[1:] if '"kind": "scan"' in line}
        for path in sorted((tmp_path / "by 2/journal").glob("*.jsonl"))
    ]
    assert len(shares) == 2 and not shares[0] & shares[1] and shares[0] | shares[1] == {*range(24)}
    assert len(read_scan(tmp_path / "by 1/scan.parquet")) == 24
