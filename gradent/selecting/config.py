"""What a selection is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradent.loading.config import option

__all__ = ["SelectConfig"]

_SCORE, _HOW, _OUT = "Score", "How many", "Output"


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Options of `select`, which describes them; the help is that of `gradent select`."""

    directory: Path = option("What `gradent scan` wrote.", _SCORE, Path, is_argument=True)  # noqa: RUF009
    by: str = option(
        "edit_distance, shared_ends, chosen_len, chosen_logp, margin, reward_margin, ches, ches_normalized, head, "
        "head_change; after a scan with --exact all: exact, predicted_change, sample_change; or random.", _SCORE,
    )  # fmt: skip
    out: Path = option(  # noqa: RUF009
        "The data that is left (.jsonl, .jsonl.gz, .json or .parquet); what went, and why, stands beside it.",
        _OUT,
        Path,
    )
    drop: str | None = option("Leave out the worst, e.g. 10%.", _HOW, default=None)
    keep: str | None = option("Keep the best, e.g. 64%.", _HOW, default=None)
    threshold: float | None = option(
        "Leave out what is worse than this score (in the score's own units).", _HOW, float, default=None
    )
    weight: bool = option(
        "Leave out nothing; write a column `weight`, 0 (worst) to 2 (best) by rank.", _HOW, bool, "--weight",
        default=False,
    )  # fmt: skip
    by_column: str | None = option(
        "Leave out the same share of every value of this column of the data.", _HOW, default=None
    )
    data: str | None = option("Where the scanned data is now, if it has moved.", _OUT, default=None)
    seed: int = option("Seed of --by random.", _SCORE, int, default=0)
    quiet: bool = False
