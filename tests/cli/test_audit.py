"""`gradent audit`, `report` and `compare` on a finished run, as a user types them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gradent.cli.app import app
from gradent.record import read_summary
from tests.auditing.trained import train_run
from tests.processes import heed_ctrl_c


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run, its base and its pairs."""
    place = tmp_path_factory.mktemp("runs")
    train_run(place, lora=True, data_rows=16)
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current directory, a console of 100 columns, other libraries let be."""
    for name in ("run", "pairs.jsonl"):
        source = folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("gradent.cli.console._quieten_others", lambda: None)
    return tmp_path


def gradent(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def audit(*arguments: str, out: str = "out") -> Result:
    return gradent("audit", "run", "--data", "pairs.jsonl", "--out", out, *arguments)


def test_a_run_is_audited_and_its_page_made_anew(here) -> None:
    result = audit("--loss", "dpo", "--beta", "0.1", "--batch-size", "4")
    assert result.exit_code == 0, result.output
    summary = read_summary("out/summary.json")
    assert [each["step"] for each in summary["checkpoints"]] == [2, 4, 6]
    assert summary["recommendation"] is not None
    assert " ".join(summary["recommendation"]["text"].split()) in " ".join(result.stdout.split())
    assert "Wrote out/report.html, out/pairs.parquet" in result.stdout
    page = Path("out/report.html").read_bytes()
    figures = {path.name: path.read_bytes() for path in Path("out/figures").iterdir()}
    assert {"logps.png", "logps.svg", "cases.png", "what_if.svg"} <= set(figures)
    for path in [Path("out/report.html"), *Path("out/figures").iterdir()]:
        path.unlink()
    again = gradent("report", "out")
    assert again.exit_code == 0, again.output
    assert "out/report.html" in again.stdout
    assert Path("out/report.html").read_bytes() == page
    assert {path.name: path.read_bytes() for path in Path("out/figures").iterdir()} == figures


def test_two_audits_side_by_side(here) -> None:
    assert audit("--no-report", out="a").exit_code == 0
    assert audit("--no-report", "--loss", "simpo", "--checkpoints", "2,6", out="b").exit_code == 0
    result = gradent("compare", "a", "b", "--out", "both.html")
    assert result.exit_code == 0, result.output
    assert "simpo" in result.stdout and Path("both.html").is_file()
    refused = gradent("compare", "a", "gone")
    assert refused.exit_code == 2 and "gone" in refused.stderr


def test_exit_code_3_says_that_something_is_left_out(here) -> None:
    (weights,) = (here / "run" / "checkpoint-4").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    result = audit("--no-report")
    assert result.exit_code == 3, result.output
    assert "left out: checkpoint-4" in result.stdout
    assert [each["step"] for each in read_summary("out/summary.json")["checkpoints"]] == [2, 6]


def test_a_base_that_is_missing_and_where_it_is_now(here, folder) -> None:
    for config in here.glob("run/checkpoint-*/adapter_config.json"):
        config.write_text(config.read_text().replace(str(folder / "base"), str(folder / "gone")))
    refused = audit("--no-report")
    assert refused.exit_code == 2
    assert "--base" in refused.stderr and "gone" in refused.stderr
    assert audit("--no-report", "--base", str(folder / "base"), "--checkpoints", "last").exit_code == 0
    assert read_summary("out/summary.json")["run"]["base"] == str(folder / "base")


def test_a_bad_row_far_down_the_data(here) -> None:
    good = json.loads((here / "pairs.jsonl").read_text().splitlines()[0])
    rows = [*[{**good, "chosen": f" {word} bright good ."} for word in ("the", "film", "soup") for _ in range(500)]]
    rows[1233] = {"prompt": "the"}
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = audit("--no-report", "--max-pairs", "8")
    assert refused.exit_code == 2
    assert "pairs.jsonl:1234: missing" in refused.stderr and "--skip-bad-rows" in refused.stderr
    assert audit("--no-report", "--max-pairs", "8", "--skip-bad-rows", "--checkpoints", "last").exit_code == 0
    data = read_summary("out/summary.json")["data"]
    assert (data["measured"], [bad["row"] for bad in data["skipped"]]) == (8, [1233])


@pytest.mark.parametrize(("given", "message"), [("some", "--max-pairs is 'some'; accepted: a whole number, or all")])
def test_a_number_of_pairs_that_is_none(given, message) -> None:
    result = audit("--max-pairs", given)
    assert result.exit_code == 2 and message in result.stderr


def test_steps_that_are_not_there() -> None:
    result = audit("--checkpoints", "2,5")
    assert result.exit_code == 2
    assert "no checkpoint of step 5" in result.stderr and "2, 4, 6" in result.stderr


def test_an_audit_under_another_loss(here) -> None:
    assert audit("--no-report", "--checkpoints", "last").exit_code == 0
    refused = gradent("report", "out", "--loss", "simpo")
    assert refused.exit_code == 2 and "say with --out where" in refused.stderr
    assert "belong to --loss" in gradent("report", "out", "--beta", "2").stderr
    result = gradent("report", "out", "--loss", "simpo", "--beta", "2", "--out", "other")
    assert result.exit_code == 0, result.output
    summary = read_summary(here / "other" / "summary.json")
    assert (summary["loss"]["name"], summary["loss"]["beta"]) == ("simpo", 2.0)
    assert "Judged again under SimPO" in summary["notes"][0]
    assert (here / "other" / "report.html").is_file()


def test_damaged_records_are_named(here) -> None:
    assert audit("--no-report", "--checkpoints", "last").exit_code == 0
    table = here / "out" / "pairs.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    result = gradent("report", "out")
    assert result.exit_code == 2
    assert "pairs.parquet: not a readable parquet file" in result.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_a_readable_partial_report(here) -> None:
    rows = (here / "pairs.jsonl").read_text() * 32
    (here / "pairs.jsonl").write_text(rows)
    command = ["audit", "run", "--data", "pairs.jsonl", "--out", "out", "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gradent", *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    journal, waited = here / "out" / "journal", 0.0
    while waited < 120 and sum(path.read_bytes().count(b'"batch"') for path in journal.glob("*.jsonl")) < 20:
        time.sleep(0.05)
        waited += 0.05
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "interrupted: out holds a partial record. The same command goes on" in stderr and "Traceback" not in stderr
    summary = read_summary("out/summary.json")
    assert not summary["complete"] and 0 < sum(each["pairs"] for each in summary["checkpoints"]) < 3 * rows.count("\n")
    assert "stopped" in (here / "out" / "report.html").read_text().lower()
    assert audit("--batch-size", "1", "--no-report").exit_code == 0
    assert read_summary("out/summary.json")["complete"]
