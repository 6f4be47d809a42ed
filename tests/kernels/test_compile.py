"""The kernels compile for an H100 without one, spill nothing, and fit its shared memory."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from gradent.kernels.fused.check import DTYPES
from gradent.kernels.fused.tiles import gram_configs, outer_configs

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "sm90.csv"


@pytest.mark.parametrize("kernel", ["gram", "outer", "outer+gradient"])
def test_the_largest_tile_compiles(kernel: str, tmp_path: Path) -> None:
    """In a process of its own: with the interpreter on, nothing is compiled."""
    target = tmp_path / "sm90.csv"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = ["--kernel", kernel, "--dtype", "bfloat16", "--last", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.compile_kernels", *asked],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = csv.DictReader(target.open(encoding="utf-8"))
    assert row["kernel"] == kernel and row["u"] == "bfloat16"
    assert 0 < int(row["registers"]) <= 255 and int(row["spilled"]) == 0
    assert 0 < int(row["shared"]) <= 227 * 1024


def test_the_committed_table_is_of_these_configurations() -> None:
    rows = list(csv.DictReader(TABLE.open(encoding="utf-8")))
    assert all(row["spilled"] == "0" and int(row["shared"]) <= 227 * 1024 for row in rows)
    for u, v in DTYPES:
        names = [str(dtype).removeprefix("torch.") for dtype in (u, v)]
        wide = u if u == v else DTYPES[0][0]
        for kernel, configs in (
            ("gram", gram_configs(wide)),
            ("outer", outer_configs(wide, store=False)),
            ("outer+gradient", outer_configs(wide, store=True)),
        ):
            listed = {
                tuple(int(row[name]) for name in vars(configs[0]))
                for row in rows
                if row["kernel"] == kernel and [row["u"], row["v"]] == names
            }
            assert listed == {tuple(vars(config).values()) for config in configs}, "python -m scripts.compile_kernels"
