"""`gradent plan`."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from gradent.auditing.state.config import TokenConfig
from gradent.cli.console import readable_errors
from gradent.cli.options import options, parameter, takes

__all__ = ["plan"]

_SHARED = options(TokenConfig, "model", "adapter", "dtype", "device", "trust_remote_code", "memory_budget")


@takes([
    parameter("tokens", int, typer.Option(min=1, help="Tokens of a row: prompt and response."), 1024),
    parameter("pairs", int, typer.Option(min=1, help="Pairs of a batch."), 1),
    *_SHARED,
])  # fmt: skip
def plan(**values: Any) -> None:
    """See beforehand how each layer would be measured, and what that costs; the model's weights are not read."""
    with readable_errors():
        from gradent.planning.command import show_plan  # noqa: PLC0415  (imports torch)

        show_plan(**values, console=Console(highlight=False))
