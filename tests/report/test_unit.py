"""A learning rate that is given: what a step would do is then in nats at it, on every page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gradent.errors import InputError
from gradent.record import write_token_record
from gradent.report import write_report
from gradent.report.page.unit import StepUnit
from tests.report.audit_records import write_audit
from tests.report.run_records import pair_rows, write_pairs
from tests.report.test_page import read
from tests.report.token_records import token_record

RATE = 2.0**-20  # scales without rounding


def text_of(page: Path) -> str:
    return " ".join(read(page.read_text("utf-8")).text.split())


def test_without_a_rate_it_is_per_unit_of_it() -> None:
    assert StepUnit().show(1.5e7) == "+1.5e+07" and str(StepUnit()) == "nats per unit of learning rate"
    unit = StepUnit.of({"lr": 1.0}, 5e-7)
    assert (unit.show(1.1e7), str(unit)) == ("+5.50", "nats at a learning rate of 5e-07")
    assert unit.show(None) == "-" and StepUnit.of({"lr": 0.5}) == StepUnit(0.5)


def test_an_audit_is_shown_at_the_rate(tmp_path: Path) -> None:
    steps = write_audit(tmp_path, with_steps=True)["steps"]
    last = steps["sample"][-1]
    before = text_of(write_report(tmp_path)[0])
    assert "to first order, in nats per unit of learning rate" in before
    after = text_of(write_report(tmp_path, lr=RATE)[0])
    assert "per unit of learning rate" not in after and "in nats at a learning rate of 9.53674e-07" in after
    for side in ("chosen", "rejected"):
        for part in ("own", "partner", "others"):
            assert (
                StepUnit(RATE).show(last[f"{side}_{part}"]) in after
                and StepUnit().show(last[f"{side}_{part}"]) in before
            )
    assert text_of(write_report(tmp_path)[0]) == before, "the records are as they were"


def test_a_rate_in_the_records_holds_until_another_is_given(tmp_path: Path) -> None:
    summary = write_audit(tmp_path, with_steps=True)
    write_audit(tmp_path, with_steps=True, settings={**summary["settings"], "lr": 0.5})
    assert "at a learning rate of 0.5" in text_of(write_report(tmp_path)[0])
    assert "at a learning rate of 0.25" in text_of(write_report(tmp_path, lr=0.25)[0])


def test_tokens_are_shown_at_the_rate(tmp_path: Path) -> None:
    record = token_record(["The", " film"], ["The", " soup"])
    write_token_record(tmp_path / "tokens.json", record)
    (page,) = write_report(tmp_path, lr=RATE)
    html, unit = page.read_text("utf-8"), StepUnit(RATE)
    sums = [unit.show(sum(record[side]["effects"])) for side in ("chosen", "rejected")]
    assert f"({sums[0]} nats at a learning rate of 9.53674e-07)" in text_of(page) and f"({sums[1]})" in text_of(page)
    assert "per unit of learning rate" not in html
    falls = re.findall(r"(?:falls|rises|neither) \(([^)]*)\)", html)
    assert falls == [unit.show(value) for side in ("chosen", "rejected") for value in record[side]["effects"]]


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf"), "5e-7"])
def test_what_is_no_rate(lr: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lr is .*; accepted is a number above 0"):
        write_report(tmp_path, lr=lr)


def test_a_run_s_records_are_of_its_own_steps(tmp_path: Path) -> None:
    write_pairs(tmp_path, pair_rows(range(10, 130, 10), lambda s, p: 0.5, lambda s, p: -1.0))
    with pytest.raises(InputError, match=r"--lr is for what a step would do.* is pairs.jsonl"):
        write_report(tmp_path, lr=1e-6)
