"""What a scan is asked for, passed whole from the command line to the journal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradent.auditing.state.config import LOSS
from gradent.loading.config import DATA, MODEL, RUN, LoadConfig, option

__all__ = ["ScanConfig"]

_EXACT = "Exact sample"


@dataclass(frozen=True, kw_only=True)
class ScanConfig(LoadConfig):
    """Options of `scan`, which describes them; the help is that of `gradent scan`."""

    data: str = option("Preference pairs, as `gradent audit` reads them; all of them are scanned.", DATA)
    out: Path = option("Directory for scan.parquet, scan.json and report.html.", RUN, Path)  # noqa: RUF009
    loss: Any = option(  # noqa: RUF009  (a name or a Loss)
        "The loss of the steps, as `gradent audit` takes it; what is not set below has its default.", LOSS,
        default="dpo",
    )  # fmt: skip
    reference: str | None = option(
        "Reference model, for implicit rewards. [default: the base under the adapter, else MODEL itself]", MODEL,
        default=None,
    )  # fmt: skip
    exact: int | None = option(
        "Measure that many pairs exactly, drawn with --seed from slices of like length; all, or 0 for none.", _EXACT,
        default=256,
    )  # fmt: skip
    seed: int = option("Seed of that draw, and of the bootstrap.", _EXACT, int, default=0)
    head: bool = option(
        "The head's block of the Gram entries; it costs about as much as the head itself.", RUN, bool,
        "--head/--no-head", default=True,
    )  # fmt: skip
    batch_size: int = option("Most pairs a batch.", RUN, int, default=8)
    memory_budget: int | str | None = option("Scratch of the reductions, e.g. 512MiB.", RUN, default=None)
    report: bool = option("Write report.html.", RUN, bool, "--report/--no-report", default=True)
    quiet: bool = False
    max_pairs: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What the record's `settings` says of these options; it says elsewhere what was scanned, and where."""
        names = (
            "split", "max_length", "truncation_mode", "max_prompt_length", "max_completion_length", "exact", "seed",
            "head", "batch_size", "memory_budget", "dtype", "device", "skip_bad_rows", "add_eos", "quantize",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
