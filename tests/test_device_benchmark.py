"""benchmarks/device.py before there is a device: every part runs at toy sizes, and what it promises can fail."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

import benchmarks.append
import benchmarks.device
from benchmarks import device_kernels, device_memory
from benchmarks.append import RESULTS
from benchmarks.device import LIMITS, main, run_apart, run_here
from benchmarks.device_bench import COLUMNS, Bench
from benchmarks.device_step import TOY, LoraLinear, build

Rows = list[dict[str, str]]

APP = typer.Typer()
APP.command()(main)


def rows_of(folder: Path) -> Rows:
    with (folder / "device.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, on a CPU in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("GRADENT_KERNELS", "triton")


@pytest.fixture
def alone() -> Callable[[str], Bench]:
    """A part's bench that writes nothing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return lambda part: Bench(part, device, toy=True, seconds=60, folder=None, commit=None)


@pytest.mark.usefixtures("interpreted")
def test_the_parts_that_time_kernels(tmp_path: Path) -> None:
    done = run("--toy", "--here", "--parts", "check,gemm,kernels,crossover", "--out", tmp_path, "--commit", "abc1234")
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path)
    assert list(rows[0])[-len(COLUMNS) :] == list(COLUMNS)
    assert {row["commit"] for row in rows} == {"abc1234"}
    assert [part for part in LIMITS if any(row["part"] == part for row in rows)] == list(LIMITS)[:4]
    for row in rows:
        numbers = [float(row[name]) for name in ("p10_ms", "median_ms", "p90_ms", "tflops", "ratio") if row[name]]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        assert not row["p10_ms"] or float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"])
    timed = [row for row in rows if row["part"] == "kernels" and row["path"] == "triton"]
    grouped = {"outer, all rows one group", "gram, all rows one group"}
    assert {row["what"] for row in timed} == {"outer", "gram", "store", "reduce_pairs, host too", *grouped}
    for row in timed:
        if row["error"]:
            assert 0 < float(row["error"]) < 1e-5
            (base,) = [
                other for other in rows
                if other["what"] == row["against"] and other["part"] == "kernels"
                and all(other[name] == row[name] for name in ("rows", "cols", "tokens", "pairs"))
            ]  # fmt: skip
            assert float(row["ratio"]) == pytest.approx(float(row["median_ms"]) / float(base["median_ms"]), rel=1e-3)
    (crossing,) = [row for row in rows if row["what"] == "crossing"]
    assert float(crossing["rule"]) == 8.0, "⅔ · 24² / 48"


@pytest.mark.usefixtures("interpreted")
def test_memory_is_held_to_its_budget(tmp_path: Path) -> None:
    done = run("--toy", "--here", "--parts", "memory", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path)
    assert [float(row["budget_mib"]) * 2**20 for row in rows] == pytest.approx([2**16, 400], rel=1e-3)
    for row in rows:
        assert row["path"] == "triton"
        rest = device_memory.SMALL / 2**20 if torch.cuda.is_available() else 0  # a GPU's allocator rounds up
        assert 0 < float(row["peak_mib"]) <= float(row["budget_mib"]) + rest


def test_a_case_above_its_budget_fails_the_part_and_keeps_its_row(monkeypatch, alone) -> None:
    bench = alone("memory")
    monkeypatch.setattr(bench, "peak", lambda reduce: 2**17 + device_memory.SMALL)
    with pytest.raises(RuntimeError, match=r"above the budget: \d+ bytes, pairs at once, Case\(tokens=20"):
        device_memory.memory(bench)
    assert bench.written == 2


@pytest.mark.usefixtures("interpreted")
def test_wrong_entries_fail_the_part(monkeypatch, alone) -> None:
    right = device_kernels.Operands.by_kernel

    def by_kernel(self: device_kernels.Operands, form: str) -> Any:
        return right(self, form) * (1.02 if form == "gram" else 1) if form != "store" else right(self, form)

    monkeypatch.setattr(device_kernels.Operands, "by_kernel", by_kernel)
    monkeypatch.setattr(device_kernels, "TOYS", device_kernels.TOYS[:1])
    with pytest.raises(RuntimeError, match=r"differ from torch's: gram by 2.0e-02 at"):
        device_kernels.kernels(alone("kernels"))


def test_flops_are_those_that_are_formed() -> None:
    given = device_kernels.Operands.__new__(device_kernels.Operands)
    given.case = device_kernels.Case(4096, 1024, 100, 3)
    assert given.flops("outer", kernel=True) == 3 * 4 * 100 * 4096 * 1024
    assert given.flops("gram", kernel=False) == 3 * 6 * 100**2 * (4096 + 1024), "one tile: three full blocks"


def test_steps(tmp_path: Path) -> None:
    done = run("--toy", "--here", "--parts", "step", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    rows = {row["what"]: row for row in rows_of(tmp_path)}
    each = ("", ", watched", ", measure", ", two backwards")
    assert set(rows) == {"full, shared", *(kind + end for kind in ("LoRA", "full") for end in each)}
    for name, row in rows.items():
        base = float(rows[row["against"]]["median_ms"])
        assert float(row["ratio"]) == pytest.approx(float(row["median_ms"]) / base, rel=1e-3), name
        if name.endswith(("watched", "shared")):
            assert 0 <= float(row["error"]) < 0.05, name
            assert "asked for: 1." in row["note"]


def test_lora_is_on_every_linear_layer_and_nothing_else_is_trained() -> None:
    model = build("LoRA", TOY, torch.device("cpu"))
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 7 * TOY.layers
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 14 * TOY.layers
    assert all(".lora_" in name for name in trained)


def test_without_a_device_it_says_what_is_needed(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run()
    assert done.exit_code == 2
    assert "H100 or H200" in done.output and "--toy" in done.output


def test_toy_figures_stay_out_of_the_results() -> None:
    before = (RESULTS / "device.csv").read_bytes() if (RESULTS / "device.csv").exists() else None
    assert run("--toy", "--here", "--parts", "gemm").exit_code == 0
    refused = run("--toy", "--here", "--parts", "gemm", "--out", RESULTS)
    assert refused.exit_code == 2 and "figures of --toy mean nothing" in " ".join(refused.output.split())
    assert ((RESULTS / "device.csv").read_bytes() if (RESULTS / "device.csv").exists() else None) == before


def test_a_part_that_fails_does_not_stop_the_next(monkeypatch, tmp_path: Path) -> None:
    whole = benchmarks.device.part_named
    monkeypatch.setattr(benchmarks.device, "part_named", lambda name: whole(name) if name == "gemm" else _broken)
    done = run("--toy", "--here", "--parts", "check,gemm", "--out", tmp_path)
    assert done.exit_code == 1
    assert "check: ValueError: broken" in done.output and "Failed: check." in done.output
    assert {row["part"] for row in rows_of(tmp_path)} == {"check", "gemm"}, "rows before the failure are kept"


def _broken(bench: Bench) -> None:
    bench.put("path", path="torch")
    raise ValueError("broken")


def test_a_part_apart(tmp_path: Path) -> None:
    assert run_apart("gemm", ["--toy", "--out", str(tmp_path)], 30) == ""
    assert {row["part"] for row in rows_of(tmp_path)} == {"gemm"}


def test_a_part_that_hangs_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(benchmarks.device, "GRACE", 0)
    assert "ended after 0 s" in run_apart("gemm", ["--toy"], 0.2)


def test_a_part_without_time_begins_nothing() -> None:
    assert run_here("step", toy=True, seconds=0, folder=None, commit=None) == "it has no rows"
    assert sum(LIMITS.values()) <= 6 * 60


def test_the_whole_has_an_end(tmp_path: Path) -> None:
    done = run("--toy", "--here", "--minutes", "0.1", "--parts", "check,gemm", "--out", tmp_path)
    assert done.exit_code == 1
    assert "gemm: left out: 0.1 minutes are over" in done.output and not (tmp_path / "device.csv").exists()


def test_unknown_parts_are_refused() -> None:
    done = run("--toy", "--parts", "gemm,abacus")
    assert done.exit_code == 2 and "abacus" in done.output


def test_rows_name_a_commit_without_git(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmarks.append.shutil, "which", lambda name: None)
    for commit in (None, "abc1234"):
        benchmarks.append.append("device", {"x": 0.123456789}, folder=tmp_path, commit=commit)
    assert [(row["commit"], row["x"]) for row in rows_of(tmp_path)] == [("unknown", "0.12346"), ("abc1234", "0.12346")]
