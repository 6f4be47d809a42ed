"""What an audit is asked for, passed whole from the command line to the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradent.loading.config import DATA, MODEL, RUN, LoadConfig, option

__all__ = ["LOSS", "LOSS_NAMES", "AuditConfig", "TokenConfig"]

LOSS = "Loss"
LOSS_NAMES = (
    "dpo", "rdpo", "simpo", "ipo", "rrhf", "slic", "cpo", "dpop", "kto", "sppo", "pairwise_normalized", "token_masked",
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
    "sigmoid_norm", "aot", "aot_unpaired", "sft",
)  # fmt: skip
"""What `losses.get` knows, and what it refuses with a reason; listed here so that a typo is told without torch."""
_BUDGET = "Scratch of the reductions, e.g. 512MiB."


@dataclass(frozen=True, kw_only=True)
class AuditConfig(LoadConfig):
    """Options of `audit`, which describes them; the help is that of `gradent audit`."""

    model: str = option(
        "Directory of a finished run (with checkpoint-* in it), or directory or hub id of a causal LM, or of a PEFT "
        "adapter.", MODEL, is_argument=True,
    )  # fmt: skip
    data: str = option(
        "Preference pairs: .jsonl, .json or .parquet file, dataset directory, or hub id, in TRL's formats.", DATA
    )
    out: Path = option("Directory for report.html, pairs.parquet, ...", RUN, Path)  # noqa: RUF009
    loss: Any = option(  # noqa: RUF009  (a name or a Loss)
        "dpo, rdpo, simpo, ipo, rrhf, slic, cpo, dpop, kto, sppo, pairwise_normalized, or TRL's (sigmoid, "
        "hinge, robust, ...); what is not set below has its default. [default: the run's own, where its files say; "
        "else dpo]", LOSS, default=None,
    )  # fmt: skip
    hyperparameters: Mapping[str, Any] | None = None
    checkpoints: str | Sequence[int] = option(
        "Of a run: all, last, or steps such as 0,200,400; 0 is the model before training.", MODEL, default="all"
    )
    base: str | None = option(
        "Of a run: the model that it started from, where its files do not say or have moved.", MODEL, default=None
    )
    reference: str | None = option(
        "Reference model. [default: what the run started from, or the base under the adapter; for a single model, "
        "MODEL itself]", MODEL, default=None,
    )  # fmt: skip
    batch_size: int = option("Most pairs a batch.", RUN, int, default=8)
    memory_budget: int | str | None = option(_BUDGET, RUN, default=None)
    engine: str = option("hooks or func.", RUN, default="hooks")
    by_module: bool = option(
        "Which modules the cosine comes from.", RUN, bool, "--by-module/--no-by-module", default=True
    )
    attribution: bool = option(
        "What steps do to every response: the run's own between checkpoints, and one on the whole sample.", RUN, bool,
        "--attribution/--no-attribution", default=True,
    )  # fmt: skip
    token_pairs: int | None = option(
        "Also measure the tokens of that many pairs, spread over all cosines, and show which entangle.", RUN, int,
        default=None,
    )  # fmt: skip
    lr: float | None = option(
        "Show what a step of plain gradient descent does in nats at this learning rate. [default: per unit of it]", RUN,
        float, default=None,
    )  # fmt: skip
    report: bool = option("Write report.html and figures.", RUN, bool, "--report/--no-report", default=True)
    wandb: str | None = option("Stream the records to this wandb project.", RUN, default=None)
    quiet: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the summary's `settings` says of these options; it says elsewhere what was measured, and where."""
        names = (
            "checkpoints", "split", "max_length", "truncation_mode", "max_prompt_length", "max_completion_length",
            "max_pairs", "token_pairs", "batch_size", "memory_budget", "engine", "by_module", "attribution", "dtype",
            "device", "skip_bad_rows", "add_eos", "seed",
            *(name for name in ("quantize", "lr") if getattr(self, name) is not None),
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        return values if isinstance(self.checkpoints, str) else {**values, "checkpoints": list(self.checkpoints)}


@dataclass(frozen=True, kw_only=True)
class TokenConfig(LoadConfig):
    """Options of `audit_tokens`: those of `audit` for one row of the data."""

    data: str = option(
        "Preference pairs, as `gradent audit` reads them, or groups of rollouts: prompt, completions, and one of "
        "weights, advantages and rewards.", DATA,
    )  # fmt: skip
    pair: int = option("Row of the data, counted from 0.", DATA, int)
    out: Path = option(  # noqa: RUF009
        "Directory for tokens.json, tokens.png and tokens.html; of a group, group_tokens.json and group_tokens.html.",
        RUN, Path,
    )  # fmt: skip
    memory_budget: int | str | None = option(_BUDGET, RUN, default=None)
    by_module: bool = option("Also show which modules entangle the pair.", RUN, bool, "--by-module", default=False)
    lr: float | None = option(
        "Show what a step of plain gradient descent does in nats at this learning rate. [default: per unit of it]", RUN,
        float, default=None,
    )  # fmt: skip
    masks: Path | None = option(  # noqa: RUF009
        "Also show which tokens a masked loss keeps: masks.parquet of TokenMaskedDPOTrainer.export_masks, of the same "
        "data.", RUN, Path, default=None,
    )  # fmt: skip
    quiet: bool = False
    max_pairs: int | None = None
    seed: int = 0
    skip_bad_rows: bool = False
