"""README and docs, typed by one who follows them: Python and commands of a page in order, in a clean folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages import GIVEN, NOT_RUN, ROOT, WHOLE, fences, given_in, train_my_run
from tests.report.run_records import pair_rows, write_pairs

PAGES = {path.name: path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}

NOT_TYPED = {
    "pip install": "what it installs is here already",
    "make": "this is one of its targets, or takes as long as it (tests/test_readme.py holds their names)",
    "swift rlhf": "ms-swift is not installed",
    "python examples/": "tests/examples runs them, and these lines take an hour",
    "python -m examples.": "tests/examples runs it, and these lines take hours",
}
"""Beginnings of command lines that are not typed, and why."""

BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def why_not_run(page: str, block: str) -> str | None:
    """Why a block of Python is not run."""
    return next((why for (where, line), why in NOT_RUN.items() if where == page and line in block.splitlines()), None)


def typed_lines(block: str) -> list[tuple[str, list[str]]]:
    """The command lines of a console block, continued ones joined, and what is shown of what each prints."""
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    if not any(line.startswith("$ ") for line in lines):
        return [(line, []) for line in lines]
    typed: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            typed.append((line.removeprefix("$ "), []))
        else:
            typed[-1][1].append(line)
    return typed


def is_typed(line: str) -> bool:
    return not line.startswith(tuple(NOT_TYPED))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_my_run(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clean folder with what pages take as given; `gradent` is on the PATH."""
    (tmp_path / "rollouts.jsonl").write_text("".join(fences(PAGES["tokens.md"], "json")), "utf-8")
    programs = tmp_path.parent / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "gradent").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gradent "$@"\n')
    (programs / "gradent").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    with given_in(tmp_path, world):
        yield tmp_path


def type_line(line: str) -> str:
    """What a shell prints of a command line; one that fails, fails the test."""
    if line.startswith("gradent watch"):
        return watch(line)
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def watch(line: str) -> str:
    """Type `gradent watch`, open the page that it names, and end it."""
    with subprocess.Popen(
        shlex.split(line) + ["--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as server:  # fmt: skip
        assert server.stdout is not None
        try:
            said, address = "", None
            until = time.monotonic() + 60
            while address is None and time.monotonic() < until:
                said += server.stdout.readline()
                address = re.search(r"http://127\.0\.0\.1:\d+\S*", said)
            assert address is not None, said
            with urllib.request.urlopen(address[0].rstrip(".,")) as page:
                assert b"<title>gradent watch my-records" in page.read()
        finally:
            server.terminate()
    return said


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if BLOCK.search(text)])
def test_a_page_does_what_it_says(page: str, folder: Path) -> None:
    if page == "dashboard.md":  # the only one that reads a callback's records and trains nothing
        write_pairs(folder / "my-records", pair_rows(range(10, 130, 10), lambda s, p: 0.5, lambda s, p: -1.0))
    names: dict[str, object] = {"__name__": "page"}
    for number, (kind, block) in enumerate(BLOCK.findall(PAGES[page])):
        if kind == "console":
            for line, shown in typed_lines(block):
                printed = type_line(line) if is_typed(line) else ""
                for each in shown if is_typed(line) else ():
                    assert masked(each) in masked(printed), f"{line} prints no {each!r}:\n{printed}"
            continue
        source = compile(block, f"{page}, block {number}", "exec", dont_inherit=True)
        if why_not_run(page, block) is None:
            if "GIVEN" not in names and page not in WHOLE | {"README.md"}:
                exec(GIVEN, names)
                names["GIVEN"] = True
            exec(source, names)


def masked(text: str) -> str:
    """Without numbers and breaks of lines, which depend on the model and the terminal."""
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]\d+)?( [kMGT]FLOP| [KMG]iB)?", "#", " ".join(text.split()))


def test_what_is_not_typed_is_still_there() -> None:
    typed = [line for text in PAGES.values() for block in fences(text, "console") for line, _ in typed_lines(block)]
    for beginning in NOT_TYPED:
        assert [line for line in typed if line.startswith(beginning)], beginning


def test_a_command_that_fails_is_noticed(folder: Path) -> None:
    with pytest.raises(AssertionError, match="No such option"):
        type_line("gradent plan my-model --lenght 3")
    assert typed_lines("$ one \\\n  two\nprinted\n$ three\n") == [("one    two", ["printed"]), ("three", [])]
    assert typed_lines("one\ntwo\n") == [("one", []), ("two", [])]
    assert masked("It is  3.5e-04,\n1,024 MiB.") == "It is #, #."
