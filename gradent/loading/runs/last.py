"""The model that a command means which takes one model, where it is given a run."""

from __future__ import annotations

from collections.abc import Callable

from gradent.loading.runs.discover import choose, find_run, is_run, refuse_adapter

__all__ = ["last_of_run"]


def last_of_run(model: str, adapter: str | None, tell: Callable[[str], object]) -> str:
    """A run's last model that can be measured, which is said; anything else stays as it is."""
    if not is_run(model):
        return model
    refuse_adapter(model, adapter)
    last = choose(find_run(model), "last")[-1]
    tell(f"{model} is a run; this is about its last model, {last.path}.")
    return last.path
