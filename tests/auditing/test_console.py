"""What an audit tells while it works."""

from __future__ import annotations

import pytest

from gradent.auditing import console


def test_without_a_terminal_there_is_a_line_every_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 30.0, 70.0, 100.0, 4000.0, 4001.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.pair_progress("measuring", 10, 100, quiet=False) as advance:
        for pairs, cost in ((2, 20), (1, 10), (1, 10), (2, 10), (4, 50)):
            advance(pairs, cost)
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 3/10 pairs in 1:10, about 2:43 left", "measuring: 6/10 pairs in 1:06:40, about 1:06:40 left",
    ]  # fmt: skip


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    with console.pair_progress("measuring", 10, 100, quiet=True) as advance:
        advance(2, 20)
    assert capsys.readouterr().err == ""
