"""`gradent scan`."""

from __future__ import annotations

from typing import Any

from gradent.auditing.state.config import LOSS
from gradent.cli.console import readable_errors, say
from gradent.cli.options import HYPERPARAMETERS, hyperparameters, options, read_options, takes
from gradent.scanning.api import scan as run_scan
from gradent.scanning.config import ScanConfig

__all__ = ["scan"]


@takes([
    *options(ScanConfig),
    *hyperparameters(LOSS),
])  # fmt: skip
def scan(**values: Any) -> None:
    """Give every pair of a data set its stand-ins (CHES, the head's block, ...), and grade them on an exact sample.

    Stopped at any point, the same command goes on where it was. `gradent select` then chooses data by one of them.
    """
    with readable_errors(loads_models=False):  # at once, before transformers is imported to be silenced
        from gradent.auditing.early import check_early  # noqa: PLC0415

        given = {name: value for name in HYPERPARAMETERS if (value := values.pop(name)) is not None}
        asked = ScanConfig(**read_options(ScanConfig, values))
        check_early(asked.loss, asked.data, asked.model, asked.out, quiet=True)
    with readable_errors():
        from gradent import losses  # noqa: PLC0415  (imports torch)

        loss = losses.get(values.pop("loss"), **given)
        result = run_scan(**read_options(ScanConfig, values), loss=loss)
        paths = [str(path) for path in (result.report_path, result.scan_path, result.record_path) if path is not None]
        say(f"\nWrote {', '.join(paths[:-1])} and {paths[-1]} ({result.record['seconds']:.1f} s).")
