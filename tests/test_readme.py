"""README and CONTRIBUTING: their Python and commands run, their links lead somewhere, their figures are the code's."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from gradent import audit, scan
from gradent.cli.app import main
from tests.pages import ROOT, commands, fences, run_python, train_my_run
from tests.processes import call
from tests.truth import TOLERANCE

README = (ROOT / "README.md").read_text("utf-8")

PAIRS = [
    {"prompt": "The film was", "chosen": " a quiet joy.", "rejected": " a loud bore."},
    {"prompt": "The soup was", "chosen": " warm.", "rejected": " cold."},
]


def test_python_snippets_run_as_one_program(local_model, monkeypatch, capsys):
    monkeypatch.chdir(local_model.parent)
    snippets = fences(README, "python")
    assert snippets
    run_python(snippets, "README.md")
    assert "tensor(" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """Where `my-run` lies."""
    return train_my_run(tmp_path_factory.mktemp("trained"))


WRITTEN = {
    "audit": {"report.html", "pairs.parquet", "sample.parquet", "modules.parquet", "summary.json", "figures"},
    "tokens": {"tokens.html", "tokens.png", "tokens.json"},
    "scan": {"report.html", "scan.parquet", "scan.json"},
}


def in_a_shell(command: list[str]) -> None:
    sys.argv = command
    main()


@pytest.mark.parametrize("command", commands(README, "gradent"), ids=" ".join)
def test_gradent_commands_run(command, local_model, finished_run):
    folder = local_model.parent
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (folder / "my-run").symlink_to(finished_run / "my-run")
    if "my-run" in command:
        shutil.copy(finished_run / "pairs.jsonl", folder / "pairs.jsonl")
    for earlier in {"my-audit", "other-audit"} & set(command if command[1] in {"report", "compare"} else ()):
        audit(folder / "my-model", folder / "pairs.jsonl", out=folder / earlier, report=False, quiet=True)
    if command[1] == "select":
        scan(folder / "my-model", folder / "pairs.jsonl", out=folder / "my-scan", report=False, quiet=True)
    done = call(in_a_shell, command, here=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    if command[1] in {"report", "compare"}:
        assert (folder / {"report": "my-audit/report.html", "compare": "compare.html"}[command[1]]).is_file()
    elif "--out" not in command:
        assert command[1] in {"plan", "doctor"} and done.stdout
    elif command[1] == "select":
        assert (folder / "kept.jsonl").is_file() and (folder / "kept.jsonl.dropped.jsonl").is_file()
    else:
        out = folder / command[command.index("--out") + 1]
        assert WRITTEN[command[1]] <= {path.name for path in out.iterdir()}


def test_the_readme_is_short():
    assert len(README.split()) <= 800


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = {word for command in commands(README, "make") for word in command[1:2]}
    assert named
    assert named <= targets


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_local_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_contributing_shows_the_tolerances():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    shown = [float(figure) for figure in re.findall(r"^\| .+ \| (\de-\d+) \|$", text, flags=re.MULTILINE)]
    assert shown == list(TOLERANCE.values())


def test_what_was_found_is_what_the_pages_have():
    words = " ".join((ROOT / "README.md").read_text("utf-8").split())
    reproduced = (ROOT / "docs" / "reproduction.md").read_text("utf-8")
    for what in ("claims about training hold", "statements of the theory hold"):
        (found,) = re.findall(rf"(\d+ of \d+) {what}", reproduced)
        assert f"{found} {what}" in words
    cures = (ROOT / "docs" / "cures-measured.md").read_text("utf-8")
    (fallen,) = re.findall(r"In (\d+) of \d+ runs .* DPO's chosen falls", cures)
    rises = dict(re.findall(r"- \*\*(\w+)\*\* raises chosen in (\d+),", cures))
    assert f"of {fallen} runs in which DPO's chosen falls, it rises in {rises['pairwise']} under pairwise" in words
    assert f"in {rises['CPO']} under CPO" in words and rises["masked"] == "0" and "in none under token masking" in words
