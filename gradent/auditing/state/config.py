"""What an audit is asked for, passed whole from the command line to the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from gradent.loading.config import DATA, MODEL, RUN, LoadConfig, Option

__all__ = ["LOSS", "AuditConfig", "TokenConfig"]

LOSS = "Loss"
_BUDGET = Option("Scratch of the reductions, e.g. 512MiB.", RUN)


@dataclass(frozen=True, kw_only=True)
class AuditConfig(LoadConfig):
    """Options of `audit`, which describes them; the help is that of `gradent audit`."""

    model: Annotated[
        str,
        Option(
            "Directory of a finished run (with checkpoint-* in it), or directory or hub id of a causal LM, or of a "
            "PEFT adapter.",
            MODEL, is_argument=True,
        ),
    ]  # fmt: skip
    data: Annotated[
        str,
        Option(
            "Preference pairs: .jsonl, .json or .parquet file, dataset directory, or hub id, in TRL's formats.", DATA
        ),
    ]
    out: Annotated[Path, Option("Directory for report.html, pairs.parquet, ...", RUN, Path)]
    loss: Annotated[
        Any,  # a name or a Loss
        Option(
            "dpo, rdpo, simpo, ipo, rrhf, slic, cpo, dpop, kto, sppo, or pairwise_normalized (of dpo); what is not set "
            "below has its default.",
            LOSS,
        ),
    ] = "dpo"
    checkpoints: Annotated[
        str | Sequence[int],
        Option("Of a run: all, last, or steps such as 0,200,400; 0 is the model before training.", MODEL),
    ] = "all"
    base: Annotated[
        str | None, Option("Of a run: the model that it started from, where its files do not say or have moved.", MODEL)
    ] = None
    reference: Annotated[
        str | None,
        Option(
            "Reference model. [default: what the run started from, or the base under the adapter; for a single model, "
            "MODEL itself]",
            MODEL,
        ),
    ] = None
    batch_size: Annotated[int, Option("Most pairs a batch.", RUN, int)] = 8
    memory_budget: Annotated[int | str | None, _BUDGET] = None
    engine: Annotated[str, Option("hooks or func.", RUN)] = "hooks"
    by_module: Annotated[
        bool, Option("Which modules the cosine comes from.", RUN, bool, "--by-module/--no-by-module")
    ] = True
    token_pairs: Annotated[
        int | None,
        Option(
            "Also measure the tokens of that many pairs, spread over all cosines, and show which entangle.", RUN, int
        ),
    ] = None
    report: Annotated[bool, Option("Write report.html and figures.", RUN, bool, "--report/--no-report")] = True
    wandb: Annotated[str | None, Option("Stream the records to this wandb project.", RUN)] = None
    quiet: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the summary's `settings` says of these options; it says elsewhere what was measured, and where."""
        names = (
            "checkpoints", "split", "max_length", "max_pairs", "token_pairs", "batch_size", "memory_budget", "engine",
            "by_module", "dtype", "device", "skip_bad_rows", "add_eos", "seed",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        return values if isinstance(self.checkpoints, str) else {**values, "checkpoints": list(self.checkpoints)}


@dataclass(frozen=True, kw_only=True)
class TokenConfig(LoadConfig):
    """Options of `audit_tokens`: those of `audit` for one row of the data."""

    pair: Annotated[int, Option("Row of the data, counted from 0.", DATA, int)]
    out: Annotated[Path, Option("Directory for tokens.json, tokens.png and tokens.html.", RUN, Path)]
    memory_budget: Annotated[int | str | None, _BUDGET] = None
    by_module: Annotated[bool, Option("Also show which modules entangle the pair.", RUN, bool, "--by-module")] = False
    masks: Annotated[
        Path | None,
        Option(
            "Also show which tokens a masked loss keeps: masks.parquet of TokenMaskedDPOTrainer.export_masks, of the "
            "same data.",
            RUN, Path,
        ),
    ] = None  # fmt: skip
    quiet: bool = False
    max_pairs: int | None = None
    seed: int = 0
    skip_bad_rows: bool = False
