"""kill -9 at any moment: started again, an audit ends with the records of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.auditing.trained import Trained, train_run

KILLS = 10
FILES = ("pairs.parquet", "sample.parquet", "modules.parquet", "tokens.parquet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return train_run(tmp_path_factory.mktemp("killed"), lora=True, data_rows=12)


def go(run: str, pairs: str, out: str) -> None:
    """The audit, in a process of its own."""
    import torch  # noqa: PLC0415

    from gradent import audit  # noqa: PLC0415

    torch.set_num_threads(1)
    audit(run, pairs, out=out, batch_size=1, token_pairs=4, report=False, quiet=True)


def start(trained: Trained, out: Path) -> Any:
    """The audit under way; what it imports is loaded beforehand, so that kills fall into its work."""
    return processes.start(go, str(trained.run), str(trained.pairs), str(out))


def records(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text())
    return {**{name: (out / name).read_bytes() for name in FILES}, "summary": {**summary, "seconds": 0}}


def lines_in(out: Path) -> int:
    """Lines of the journal so far."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("journal/*.jsonl"))


# Moments are random in the journal's lines and some milliseconds after: those of a clock depend on who else computes.
@pytest.mark.slow
def test_killed_at_ten_random_moments(trained, tmp_path) -> None:
    undisturbed = start(trained, tmp_path / "whole")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    total = lines_in(tmp_path / "whole")
    chance, lines, killed = random.Random(0), [0], 0
    for _ in range(5 * KILLS):
        process = start(trained, tmp_path / "out")
        moment = lines[-1] + chance.randrange(total // KILLS)
        while process.is_alive() and lines_in(tmp_path / "out") < moment:
            time.sleep(0.01)
        process.join(chance.uniform(0, 0.5))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        lines.append(lines_in(tmp_path / "out"))
        if killed == KILLS:
            break
        if process.exitcode == 0:  # it got through between two kills: the rest begin anew
            assert records(tmp_path / "out") == records(tmp_path / "whole")
            for path in (tmp_path / "out").glob("journal/*.jsonl"):
                path.unlink()
            lines.append(0)
    assert killed == KILLS
    assert len(set(lines)) > 3, lines  # the kills fell into the work, and it went on in between
    last = start(trained, tmp_path / "out")
    last.join()
    assert last.exitcode == 0
    assert records(tmp_path / "out") == records(tmp_path / "whole")
