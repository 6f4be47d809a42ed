"""The page of a run's records: its finding, its numbers, and what it does not say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradent.errors import DataFileError
from gradent.figures.charts import Bars, Chart
from gradent.report import write_report
from gradent.report.page.html import Page
from gradent.report.page.parts import BigNumber, Notice, Numbers
from gradent.report.run.finding import describe_finding, describe_moved, describe_trust, find_fall
from gradent.report.run.page import run_page
from gradent.report.run.records import RunRecords, read_run
from tests.report.run_records import pair_rows, write_pairs, write_rows

STEPS = range(10, 130, 10)


def records(folder: Path, chosen: Any, rejected: Any, steps: range = STEPS, **fields: Any) -> RunRecords:
    return read_run(write_pairs(folder, pair_rows(steps, chosen, rejected, **fields)))


def noise(step: int, pair: int) -> float:
    return 0.02 * math.sin(3 * step + 7 * pair)


def parts_of(page: Page, kind: type) -> list[Any]:
    return [part for section in page.sections for part in section.parts if isinstance(part, kind)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        (0.5, -1.0, "As meant, chosen rises and rejected falls: chosen +0.500, rejected -1.00 nats a step"),
        (0.5, 1.0, "Both rise: chosen +0.500, rejected +1.00 nats a step"),
        (-0.5, 1.0, "Reversed, chosen falls and rejected rises: chosen -0.500, rejected +1.00 nats a step"),
        (-0.5, -1.0, "Both fall since step 10: chosen -0.500, rejected -1.00 nats a step"),
        (0.0, -1.0, "No clear movement of chosen: chosen"),
    ],
)
def test_the_finding(chosen: float, rejected: float, words: str, tmp_path: Path) -> None:
    found = records(tmp_path, lambda s, p: chosen + (noise(s, p) if not chosen else 0), lambda s, p: rejected)
    assert describe_finding(found).startswith(words)
    assert run_page(found).title == describe_finding(found)


def test_both_fall_since_the_best_point(tmp_path: Path) -> None:
    """Chosen rises until step 40 and falls from 50 on, although it is never below where it began."""
    found = records(tmp_path, lambda s, p: 1.0 + noise(s, p) if s <= 40 else -0.25 + noise(s, p), lambda s, p: -1.0)
    assert find_fall(found) == 50
    late = [step for step in STEPS if step > 40]
    mean = float(np.mean([-0.25 + noise(step, pair) for step in late for pair in range(4)]))
    assert describe_finding(found) == f"Both fall since step 50: chosen {mean:+.3f}, rejected -1.00 nats a step"
    page = run_page(found)
    (chart, *_) = parts_of(page, Chart)
    assert chart.marks == [(50.0, "both fall since")] and chart.x_label == "training step" and "nats" in chart.y_label
    (numbers,) = parts_of(page, Numbers)
    values = {number.name: number for number in numbers.numbers}
    spread = np.std([-0.25 + noise(step, pair) for step in late for pair in range(4)], ddof=1) / math.sqrt(32)
    want = BigNumber("Chosen, nats a step", f"{mean:+.3f} ± {spread:.1g}", "since step 50")
    assert values["Chosen, nats a step"] == want
    assert values["Pairs of which a step lowers both"].value.startswith("100% [89, 100]")


def test_a_fall_of_few_pairs_is_no_finding(tmp_path: Path) -> None:
    few = records(tmp_path, lambda s, p: -1.0, lambda s, p: -1.0, steps=range(10, 80, 10))
    assert describe_finding(few) == "Too early to tell: 28 pairs of 7 steps measured so far"
    assert find_fall(few) is None and describe_trust(few)[1], "a warning"


def test_what_moved_it(tmp_path: Path) -> None:
    found = records(tmp_path, lambda s, p: 1.0, lambda s, p: -1.0)
    assert describe_moved(found) == (
        "Mean nats a step, to first order. Chosen: rejected partner -2.00, momentum +0.500, own gradient +2.50; "
        "together +1.00. Rejected: own gradient -2.50, momentum -0.500, chosen partner +2.00; together -1.00."
    )
    falls = records(tmp_path / "falls", lambda s, p: -1.0, lambda s, p: -1.0)
    assert describe_moved(falls).count("own gradient -2.50") == 2
    bars = parts_of(run_page(found), Bars)
    chosen = next(each for each in bars if each.title == "What moved chosen")
    assert chosen.places == list(STEPS) and chosen.names[0] == "step 10"
    assert {series.name: series.values[3] for series in chosen.series if series.values[3]} == {
        "own": 2.5, "partner": -2.0, "momentum": 0.5,
    }  # fmt: skip


def test_where_to_look(tmp_path: Path) -> None:
    rows = pair_rows(STEPS, lambda s, p: -1.0, lambda s, p: -1.0)
    for row in rows:
        row |= {"chosen_moved_own": 2.0, "chosen_moved_partner": 0.0, "chosen_moved_momentum": 0.0}
        row |= {"chosen_moved_others_rejected": -2.0, "chosen_moved_others_chosen": -1.0}
    moved = describe_moved(read_run(write_pairs(tmp_path, rows)))
    assert "Chosen: other pairs -3.00, own gradient +2.00; together -1.00." in moved and "duplicates" in moved


@pytest.mark.parametrize(("factor", "words"), [(1.0, "100%"), (2.0, "75%"), (-1.0, "nothing")])
def test_how_far_to_trust_it(factor: float, words: str, tmp_path: Path) -> None:
    """Realised changes are `factor` times what was accounted for; the finding is of what really happened."""
    rows = pair_rows(STEPS, lambda s, p: -1.0, lambda s, p: -1.0)
    for row in rows:
        row |= {"chosen_realised": -factor, "rejected_realised": -factor}
    found = read_run(write_pairs(tmp_path, rows))
    text, warns = describe_trust(found)
    assert f"explains {words} of what the optimizer's steps really did" in text and warns == (factor < 0)
    assert ("too little to read the sources" in text) == (factor < 0)
    assert describe_finding(found).startswith("Both rise" if factor < 0 else "Both fall since step 10")


def test_steps_without_an_account(tmp_path: Path) -> None:
    found = records(tmp_path, lambda s, p: 1.0, lambda s, p: -1.0, **dict.fromkeys(
        [f"{side}_moved_{source}" for side in ("chosen", "rejected") for source in (
            "own", "partner", "others_chosen", "others_rejected", "earlier_batches", "momentum", "weight_decay")]
    ))  # fmt: skip
    assert describe_moved(found) == "" and "No step has an account" in describe_trust(found)[0]
    assert describe_finding(found) == "A small step on each pair alone would lower both in 50% [36, 64] of 48 pairs"
    assert "What moved it" not in [part.title for part in parts_of(run_page(found), Notice)]


def test_adams_first_steps_are_not_counted(tmp_path: Path) -> None:
    found = records(tmp_path, lambda s, p: 100.0 if s < 5 else -1.0, lambda s, p: -1.0, steps=range(1, 20))
    assert describe_finding(found).startswith("Both fall since step 5: chosen -1.00")


def test_cases_have_intervals_and_bars_their_pairs(tmp_path: Path) -> None:
    page = run_page(records(tmp_path, lambda s, p: 1.0, lambda s, p: -1.0))
    section = next(section for section in page.sections if section.title == "Each pair alone")
    assert "case 1: ideal 50% [36, 64], case 2: both down 50% [36, 64]" in section.text
    assert "reversed 0%" not in section.text and section.folded
    (bars,) = section.parts
    assert bars.names[0] == "step 10, 4 pairs" and [series.values[0] for series in bars.series] == [0.5, 0.5]


def test_long_runs_are_joined(tmp_path: Path) -> None:
    page = run_page(records(tmp_path, lambda s, p: s / 1000, lambda s, p: -1.0, steps=range(5, 805)))
    (chart, *_) = parts_of(page, Chart)
    assert len(chart.lines[0].x) == 80 and chart.lines[0].x[0] == 9.5
    assert chart.lines[0].y[0] == pytest.approx(0.0095)


def test_rows_of_groups(tmp_path: Path) -> None:
    """Positives are lowered by a half of the steps' moves, negatives as well."""
    found = read_run(write_rows(tmp_path, STEPS, lambda s, row: -0.5 if row < 6 else 0.1))
    assert describe_finding(found) == "Both fall since step 10: positives -0.350, negatives -0.350 nats a step"
    (numbers,) = parts_of(run_page(found), Numbers)
    share = next(each for each in numbers.numbers if each.name == "Positives that a step lowers")
    assert share.value == "75% [61, 85]" and share.note == "of 48, since step 10"
    up = read_run(write_rows(tmp_path / "up", STEPS, lambda s, row: -0.5 if row % 2 else 0.5))
    assert describe_finding(up).startswith("As meant, positives rise and negatives fall: positives +0.500")


def test_the_page_is_written_from_the_stream(tmp_path: Path) -> None:
    write_pairs(tmp_path, pair_rows(STEPS, lambda s, p: 0.5, lambda s, p: -1.0))
    assert write_report(tmp_path) == [tmp_path / "report.html"]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "As meant, chosen rises and rejected falls" in page and "<script src" not in page
    write_rows(tmp_path, STEPS, lambda s, row: 0.1)
    assert write_report(tmp_path) == [tmp_path / "report.html", tmp_path / "rows_report.html"]


def test_an_audit_and_a_run_in_one_directory(tmp_path: Path) -> None:
    write_pairs(tmp_path, pair_rows(STEPS, lambda s, p: 0.5, lambda s, p: -1.0))
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(DataFileError, match=r"summary.json .* and pairs.jsonl .*EntanglementCallback"):
        write_report(tmp_path)


def test_an_audit_under_way_is_seen(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "abc-0.jsonl").write_text(json.dumps({"schema": "gradent.audit_journal"}))
    with pytest.raises(DataFileError, match=r"its audit is not done: it is under way, or was stopped.*goes on"):
        write_report(tmp_path)
