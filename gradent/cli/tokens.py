"""`gradent tokens`."""

from __future__ import annotations

from typing import Any

from gradent.auditing.state.config import TokenConfig
from gradent.cli.console import readable_errors, say
from gradent.cli.options import options, read_options, takes

__all__ = ["tokens"]


@takes(options(TokenConfig))
def tokens(**values: Any) -> None:
    """Look at one pair, token by token: which tokens pull chosen and rejected along, and which hold them apart?"""
    with readable_errors():
        from gradent.auditing.pair_tokens import audit_tokens  # noqa: PLC0415  (imports torch)

        result = audit_tokens(TokenConfig(**read_options(TokenConfig, values)))
        paths = f"{result.page_path}, {result.picture_path} and {result.record_path}"
        say(f"\nWrote {paths} ({result.record['seconds']:.1f} s).")
