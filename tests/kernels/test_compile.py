"""The kernels compile for an H100 without one, spill nothing, and fit its shared memory."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from gradent.kernels.common.tiles import gram_configs, group_configs, outer_configs
from gradent.kernels.self_check import DTYPES

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "3.4.0"
"""Some configurations spill under this release of Triton, the oldest that gradent takes."""
TABLE = ROOT / "benchmarks" / "results" / "sm90.csv"


def run(module: str, *asked: str, cache: Path) -> str:
    """What a module prints in a process of its own: with the interpreter on, nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *asked],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# A minute of compiling, which rests on the kernels and the pins alone: all are owed when these change.
@pytest.mark.parametrize(
    "kernel",
    ["groups", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gram", "outer", "outer+gradient"))],
)
def test_the_largest_tile_compiles(kernel: str, tmp_path: Path) -> None:
    target = tmp_path / "sm90.csv"
    asked = ["--kernel", kernel, "--dtype", "bfloat16", "--last", "--target", str(target)]
    run("scripts.compile_kernels", *asked, cache=tmp_path / "cache")
    (row,) = csv.DictReader(target.open(encoding="utf-8"))
    assert row["kernel"] == kernel and row["u"] == "bfloat16"
    assert 0 < int(row["registers"]) <= 255 and int(row["spilled"]) == 0
    assert 0 < int(row["shared"]) <= 227 * 1024


def test_the_committed_table_is_of_these_configurations() -> None:
    rows = list(csv.DictReader(TABLE.open(encoding="utf-8")))
    assert all(int(row["shared"]) <= 227 * 1024 for row in rows)
    newer = [row for row in rows if row["triton"] != OLDEST]
    assert all(row["spilled"] == "0" for row in newer if row["kernel"] != "groups")
    assert all(int(row["spilled"]) <= 32 and (row["spilled"] == "0" or int(row["registers"]) <= 128) for row in newer)
    for u, v in DTYPES:
        names = [str(dtype).removeprefix("torch.") for dtype in (u, v)]
        wide = u if u == v else DTYPES[0][0]
        for kernel, configs in (
            ("gram", gram_configs(wide)),
            ("outer", outer_configs(wide, store=False)),
            ("outer+gradient", outer_configs(wide, store=True)),
            ("groups", group_configs(wide)),
        ):
            listed = {
                tuple(int(row[name]) for name in vars(configs[0]))
                for row in rows
                if row["kernel"] == kernel and [row["u"], row["v"]] == names
            }
            assert listed == {tuple(vars(config).values()) for config in configs}, "python -m scripts.compile_kernels"


def test_the_page_says_what_the_table_holds() -> None:
    rows = list(csv.DictReader(TABLE.open(encoding="utf-8")))
    releases = {row["triton"] for row in rows}
    assert releases == {OLDEST, "3.6.0", "3.9.0"} and len(rows) % len(releases) == 0
    registers, shared = (max(int(row[name]) for row in rows) for name in ("registers", "shared"))
    spilling = [int(row["spilled"]) for row in rows if int(row["spilled"]) and row["triton"] == OLDEST]
    newer = [int(row["spilled"]) for row in rows if int(row["spilled"]) and row["triton"] != OLDEST]
    page = " ".join((ROOT / "docs" / "kernels.md").read_text("utf-8").split())
    assert f"[all {len(rows) // len(releases)} configurations]" in page
    assert f"with at most {registers} of them and {shared // 1024} KiB of shared memory" in page
    assert f"by 3.6 and 3.9 in {len(newer)}, at most {max(newer)} bytes a thread" in page
    assert f"3.4, the oldest that is taken, spills in {len(spilling)}, {max(spilling)} bytes a thread at most" in page


@pytest.mark.nightly
def test_what_launches_compile(tmp_path: Path) -> None:
    told = json.loads(run("tests.kernels.launched", cache=tmp_path / "cache"))
    assert told["different"] == [], "the table is of what a launch compiles"
    assert set(told["whole"].values()) == {1}, "one compilation a tile, whatever multiples of 8 the sizes are"
    assert max(told["eights"].values()) <= 4, "a row of 8 has a stride of 1 unit, which is compiled for"
    assert max(told["odd"].values()) <= 2, "u of an odd width costs one more"
    for name, (copies, singly) in told["r8"].items():
        assert copies > 0 and singly == 0, f"{name}: LoRA's r = 8 is loaded as r = 16 is"
    assert all(singly > 0 for _, singly in told["r7"].values()), "the count can fail"
