"""How long each test file takes, against the committed tests/budgets.json: said at the end of a run, never asserted.

`make budgets` writes the file anew. Machines differ in speed: a file is over its budget where it takes more than twice
its part of the run, and some seconds.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

BUDGETS = Path(__file__).with_name("budgets.json")
GRACE = 5.0


def seconds_of(reports: Iterable[pytest.TestReport]) -> Counter[str]:
    """Seconds that the tests of each file took, set-up and tear-down included."""
    total: Counter[str] = Counter()
    for report in reports:
        if isinstance(report, pytest.TestReport):
            total[report.nodeid.partition("::")[0]] += report.duration
    return total


def over_budget(took: Counter[str], budgets: dict[str, float]) -> list[str]:
    """A line for each file that took too much of a run, the worst first; new files have no budget yet."""
    known = {name: seconds for name, seconds in took.items() if name in budgets}
    speed = sum(known.values()) / max(1e-9, sum(budgets[name] for name in known))
    late = {name: seconds for name, seconds in known.items() if seconds > 2 * speed * budgets[name] + GRACE}
    lines = [
        f"{name}: {seconds:.0f} s, {speed * budgets[name]:.0f} s budgeted on this machine"
        for name, seconds in sorted(late.items(), key=lambda item: -item[1])
    ]
    new = {name: seconds for name, seconds in took.items() if name not in budgets and seconds > GRACE}
    return lines + [f"{name}: {seconds:.0f} s, no budget yet" for name, seconds in sorted(new.items())]


def tell(reporter: pytest.TerminalReporter) -> None:
    """At the end of a run: write the budgets where it was asked for, else say which files are over theirs."""
    took = seconds_of(report for reports in reporter.stats.values() for report in reports)
    if os.environ.get("BUDGETS") == "write":
        BUDGETS.write_text(json.dumps({name: round(took[name], 1) for name in sorted(took)}, indent=0) + "\n")
    elif len(took) > 100 and (lines := over_budget(took, json.loads(BUDGETS.read_text()))):
        reporter.section("over budget (tests/budgets.py)")
        for line in lines:
            reporter.line(line)
