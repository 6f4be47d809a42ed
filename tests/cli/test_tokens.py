"""`gradent tokens` on the command line: its options arrive, its errors are readable, its process is quiet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradent.cli.app import app
from gradent.record import read_group_tokens, read_token_record
from tests.auditing.made import PAIRS, save_lora, write_jsonl


@pytest.fixture(autouse=True)
def here(local_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(local_model.parent)
    monkeypatch.setenv("COLUMNS", "100")
    write_jsonl(local_model.parent / "pairs.jsonl", PAIRS)
    return local_model.parent


def tokens(*arguments: str, pair: str = "1"):
    return CliRunner().invoke(
        app, ["tokens", "my-model", "--data", "pairs.jsonl", "--pair", pair, "--out", "out", *arguments]
    )


def test_every_option_arrives(here, monkeypatch) -> None:
    monkeypatch.setattr("gradent.cli.console._quieten_others", lambda: None)
    save_lora(here / "adapter", here / "my-model")
    result = tokens(
        "--adapter", "adapter", "--dtype", "float64", "--device", "cpu", "--max-length", "20", "--no-add-eos",
        "--memory-budget", "64MiB", "--by-module", "--split", "train", "--lr", "0.5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = read_token_record("out/tokens.json")
    assert record["settings"] == {
        "max_length": 20, "add_eos": False, "memory_budget": "64MiB", "by_module": True, "dtype": "float64",
        "device": "cpu", "lr": 0.5,
    }  # fmt: skip
    assert record["model"]["adapter"] == "adapter" and record["modules"]
    assert (record["data"]["row"], record["data"]["truncated"]) == (1, 1)
    assert "nats at a learning rate of 0.5" in Path("out/tokens.html").read_text("utf-8")
    assert "The most entangling tokens" in result.stdout and "out/tokens.html" in result.stdout


@pytest.mark.parametrize(
    ("pair", "message"), [("7", "there is no row 7. It has 7 rows"), ("2", "pairs.jsonl:3: chosen is empty")]
)
def test_errors_are_readable(pair, message, here, monkeypatch) -> None:
    monkeypatch.setattr("gradent.cli.console._quieten_others", lambda: None)
    write_jsonl(here / "pairs.jsonl", [*PAIRS[:2], {**PAIRS[2], "chosen": []}, *PAIRS[3:]])
    result = tokens(pair=pair)
    assert result.exit_code == 2
    assert "\nerror (" in result.stderr and message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not list(Path("out").glob("*"))


def test_masks_arrive(here, monkeypatch) -> None:
    monkeypatch.setattr("gradent.cli.console._quieten_others", lambda: None)
    result = tokens("--masks", "nowhere.parquet")
    assert result.exit_code == 2
    assert "nowhere.parquet: there is no such file. `TokenMaskedDPOTrainer.export_masks` writes it." in " ".join(
        result.stderr.split()
    )


def test_a_group_of_rollouts(here, monkeypatch) -> None:
    monkeypatch.setattr("gradent.cli.console._quieten_others", lambda: None)
    group = {"prompt": "The film was", "completions": [" good", " bad", " so"], "weights": [0.5, -0.25, -0.25]}
    write_jsonl(here / "pairs.jsonl", [PAIRS[0], group])
    result = tokens("--no-add-eos", "--memory-budget", "64MiB")
    assert result.exit_code == 0, result.output
    assert "Wrote out/group_tokens.html and out/group_tokens.json" in result.stdout
    record = read_group_tokens("out/group_tokens.json")
    assert record["settings"]["memory_budget"] == "64MiB" and not record["settings"]["add_eos"]
    write_jsonl(here / "pairs.jsonl", [PAIRS[0], {**group, "weights": [1, 2]}])
    result = tokens()
    assert result.exit_code == 2
    assert "pairs.jsonl:2: weights is 2 values for 3 completions" in " ".join(result.stderr.split())


def test_usage() -> None:
    assert CliRunner().invoke(app, ["tokens", "--help"]).exit_code == 0
    assert CliRunner().invoke(app, ["tokens", "my-model", "--data", "pairs.jsonl", "--out", "out"]).exit_code == 2


def test_a_real_process_prints_its_tables_and_nothing_of_other_libraries(here) -> None:
    run = [sys.executable, "-m", "gradent", "tokens", "my-model", "--data", "pairs.jsonl", "--pair", "0", "--out", "o"]
    done = subprocess.run(run, cwd=here, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "The most entangling tokens" in done.stdout and "identical tokens" in done.stdout
    assert all(line.startswith("note: ") for line in done.stderr.splitlines())
