"""An error of gradent's own becomes a reason, and a private backward is seen by its own guard alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gradent.hooks.overhead import Clock
from gradent.hooks.piggyback.guard import Guard, private_backward


def fails_with(error: Exception) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def make(calls: list[str] | None = None) -> Guard:
    return Guard(Clock(), on_out_of_memory=lambda: (calls if calls is not None else []).append("dropped"))


def test_an_error_costs_the_entries_alone_and_the_first_reason_stands() -> None:
    guard = make()
    guard.guarded(fails_with(ValueError("first")))
    guard.guarded(fails_with(ValueError("second")))
    assert guard.no_entries_reason == "gradent's own ValueError: first"
    assert guard.unusable_reason is None


def test_memory_that_runs_out_costs_the_backward() -> None:
    calls: list[str] = []
    guard = make(calls)
    guard.guarded(fails_with(torch.OutOfMemoryError("no room")))
    assert "no room" in (guard.no_entries_reason or "")
    assert "smaller memory_budget" in (guard.unusable_reason or "")
    assert calls == ["dropped"]


def test_what_is_broken_off_has_no_entries_either() -> None:
    guard = make()
    guard.break_off("not a batch of pairs")
    guard.break_off("something else")
    assert guard.no_entries_reason == guard.unusable_reason == "not a batch of pairs"


def test_time_is_counted_where_a_part_fails_too() -> None:
    guard = make()
    guard.guarded(fails_with(ValueError()))
    assert guard.clock.seconds > 0


def test_a_private_backward_is_seen_by_its_guard_alone() -> None:
    ours, theirs = make(), make()
    seen: list[str] = []
    with private_backward(ours):
        for name, guard in (("ours", ours), ("theirs", theirs)):
            guard.guarded(seen.append, name)
        with private_backward(None):
            ours.guarded(seen.append, "nobody's")
    theirs.guarded(seen.append, "theirs, afterwards")
    assert seen == ["ours", "theirs, afterwards"]


def test_a_private_backward_ends_with_an_error() -> None:
    guard = make()
    seen: list[str] = []
    with pytest.raises(ZeroDivisionError), private_backward(None):
        raise ZeroDivisionError
    guard.guarded(seen.append, "seen")
    assert seen == ["seen"]
