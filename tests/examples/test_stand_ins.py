"""docs/stand-ins.md: its tables are those of docs/stand-ins.json, and the ranges in its prose are theirs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.pages import ROOT

PAGE = ROOT / "docs" / "stand-ins.md"


def test_the_page_has_the_tables_of_its_records(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(re.sub(r"\| [+(-].*", "", PAGE.read_text("utf-8")), "utf-8")
    command = [sys.executable, "examples/stand_ins.py", "page", "--target", str(tmp_path / "page.md")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "page.md").read_text("utf-8") == PAGE.read_text("utf-8")


def test_the_ranges_in_its_prose_are_those_of_answers() -> None:
    grades = json.loads((ROOT / "docs" / "stand-ins.json").read_text("utf-8"))["grades"]
    rows = [row for each in grades if "tweet" not in each["data"] for row in each["grades"]]
    words = " ".join(PAGE.read_text("utf-8").split())

    def least(rung: str, goal: str) -> str:
        values = [row[goal]["spearman"] for row in rows if row["rung"] == rung]
        return f"{min(value for value in values if value is not None):.2f} or more"

    assert f"the head's cosine ({least('head', 'cosine')} on answers)" in words
    assert f"edit distance ({least('edit_distance', 'cosine')})" in words
    assert f"(`head_change`, {least('head_change', 'pair_change')} on answers" in words
    assert f"({least('chosen_logp', 'sample_change')} on answers)" in words
    negative = [row["pair_change"]["spearman"] < 0 for row in rows if row["rung"] == "ches_normalized"]
    assert (sum(negative), len(negative)) == (5, 9) and "negative in five of nine settings with answers" in words
