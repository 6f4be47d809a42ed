"""`gradent tokens`."""

from __future__ import annotations

from typing import Any

from gradent.auditing.state.config import TokenConfig
from gradent.cli.console import readable_errors, say
from gradent.cli.options import options, read_options, takes

__all__ = ["tokens"]


@takes(options(TokenConfig))
def tokens(**values: Any) -> None:
    """Look at one pair, token by token: which tokens pull chosen and rejected along, and which hold them apart?

    Of a row with "completions", a group of rollouts: which tokens of lowered ones pull a raised one down?
    """
    with readable_errors():
        from gradent.auditing.pair_tokens import audit_tokens  # noqa: PLC0415  (imports torch)

        result = audit_tokens(TokenConfig(**read_options(TokenConfig, values)))
        *paths, last = map(str, result.paths)
        say(f"\nWrote {', '.join(paths)} and {last} ({result.record['seconds']:.1f} s).")
