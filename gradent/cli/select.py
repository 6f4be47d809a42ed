"""`gradent select`."""

from __future__ import annotations

from typing import Any

from gradent.cli.console import readable_errors, say
from gradent.cli.options import options, read_options, takes
from gradent.selecting.config import SelectConfig

__all__ = ["select"]


@takes(options(SelectConfig))
def select(**values: Any) -> None:
    """Write a scanned data set without the pairs that a score says harm, in its order and format, or with weights."""
    with readable_errors(loads_models=False):
        from gradent.selecting.api import select as run_select  # noqa: PLC0415

        result = run_select(**read_options(SelectConfig, values))
        say(f"\nWrote {result.out} and {result.reasons_path}.")
