"""The files that an audit leaves behind: its records, the page and the figures."""

from __future__ import annotations

import time

from gradent.auditing.analysis.summary import Outcome
from gradent.auditing.state.config import AuditConfig
from gradent.record import (
    AUDIT_FILES,
    write_modules,
    write_pairs,
    write_sample,
    write_steps,
    write_summary,
    write_tokens,
)
from gradent.report.rebuild import write_audit

__all__ = ["write_records"]


def write_records(config: AuditConfig, outcome: Outcome, started: float) -> None:
    """Write everything into the audit's directory; what an earlier audit left there goes first."""
    directory = config.out
    earlier = [directory / name for name in AUDIT_FILES if name != "pairs.parquet"]
    for path in [*earlier, *directory.glob("figures/*.png"), *directory.glob("figures/*.svg")]:
        path.unlink(missing_ok=True)  # an earlier audit's must not stand beside this one's pairs
    write_pairs(directory / "pairs.parquet", outcome.pairs.to_lists())
    write_sample(directory / "sample.parquet", outcome.sample.to_lists())
    if outcome.steps is not None:
        write_steps(directory / "steps.parquet", outcome.steps.to_lists())
    if outcome.modules is not None:
        write_modules(directory / "modules.parquet", outcome.modules.to_lists())
    if outcome.tokens is not None:
        write_tokens(directory / "tokens.parquet", outcome.tokens.to_lists())
    seconds = round(time.monotonic() - started, 3)
    write_summary(directory / "summary.json", {**outcome.summary, "seconds": seconds})
    if config.report:
        write_audit(directory)
