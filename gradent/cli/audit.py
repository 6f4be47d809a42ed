"""`gradent audit`."""

from __future__ import annotations

import os
from typing import Any

import typer

from gradent.auditing.api import audit as run_audit
from gradent.auditing.state.config import LOSS, AuditConfig
from gradent.cli.console import readable_errors, say
from gradent.cli.options import HYPERPARAMETERS, hyperparameters, options, parameter, read_options, takes
from gradent.report.page.unit import check_lr

__all__ = ["audit"]


@takes([
    *options(AuditConfig),
    *hyperparameters(LOSS),
    parameter("length_normalized", bool | None, typer.Option(
        "--length-normalized/--no-length-normalized", rich_help_panel=LOSS, show_default=False,
        help="Whether ipo averages over tokens, as TRL does and the paper does not. [default: as TRL, of a TRL run]",
    ), None),
])  # fmt: skip
def audit(**values: Any) -> None:
    """Measure preference pairs: will the loss raise chosen and lower rejected, or drag both the same way?

    Of a finished run, the same pairs are measured at every checkpoint. Stopped at any point, the same command goes on
    where it was. Exit code 0: all was measured; 2: nothing could be; 3: some checkpoints are left out; 130: stopped.
    """  # noqa: DOC501
    names = (*HYPERPARAMETERS, "length_normalized")
    given = {name: value for name in names if (value := values.pop(name)) is not None}
    with readable_errors(loads_models=False):  # at once, before transformers is imported to be silenced
        from gradent.auditing.early import check_early  # noqa: PLC0415

        options_read = read_options(AuditConfig, values)
        asked = AuditConfig(**options_read)
        check_lr(asked.lr)
        check_early(asked.loss, asked.data, asked.model, asked.out, quiet=True)
    with readable_errors():
        result = run_audit(**options_read, hyperparameters=given)
        files = (
            result.report_path, result.pairs_path, result.sample_path, result.steps_path, result.modules_path,
            result.tokens_path, result.summary_path,
        )  # fmt: skip
        paths = [str(path) for path in files if path is not None]
        say(f"\nWrote {', '.join(paths[:-1])} and {paths[-1]} ({result.summary['seconds']:.1f} s).")
    if result.summary["left_out"] and os.environ.get("RANK", "0") == "0":  # a launcher kills the others over it
        raise typer.Exit(3)
