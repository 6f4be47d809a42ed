"""README and CONTRIBUTING: their Python and commands run, their links lead somewhere, their figures are the code's."""

from __future__ import annotations

import re

import pytest

from tests.pages import ROOT, commands
from tests.truth import TOLERANCE

README = (ROOT / "README.md").read_text("utf-8")


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
