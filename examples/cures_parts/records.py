"""`data/cures.csv` and `data/cures.json`: every figure of every run, and what they were obtained with.

A run's rows replace those of an earlier run on the same data; the rows of other data stay.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
import typer

from gradent.kernels.availability import device_name

__all__ = ["COLUMNS", "machine", "read", "require_equal_runs", "require_same", "write"]

COLUMNS = (
    "data", "optimizer", "phase", "method", "style", "seed", "rate", "mask_eta", "mask_learning_rate", "step",
    "chosen", "rejected", "cosine", "label", "preferred", "label_right", "answers",
    "kept_label", "kept_shared", "kept_chosen", "kept_rejected", "seconds",
)  # fmt: skip
"""A row a look at a model: `phase` is "rate" or "masks" (tuning: the first and last step, log-probs alone) or "run".

The figures are those of `probe.FIGURES`; the masked trainer's `kept_*` are in the row of its last step, and so are a
run's `seconds`.
"""

ROUNDING = 0.01
"""Log-probs after DPO's runs on two processors that lie apart by less than this share of them are of one table."""

ELSEWHERE = "elsewhere"
"""Key of the methods that were run on another processor than the rest."""

_HARDWARE = ("processor", "cores")
_WORDS = ("data", "optimizer", "phase", "method", "style")
Row = dict[str, Any]


def machine() -> dict[str, str]:
    """What the figures are obtained on.

    Returns:
        Processor and versions.
    """
    return {
        "processor": device_name(torch.device("cpu")),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def read(out: Path) -> tuple[list[Row], dict[str, Any]]:
    """The records of a directory.

    Args:
        out: the directory.

    Returns:
        `(rows, about)`: the rows of `COLUMNS`, empty cells as nan, and by data what they were obtained with.
    """
    path = out / "data" / "cures.csv"
    if not path.is_file():
        return [], {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            {
                name: value if name in _WORDS else float(value or "nan")
                for name, value in row.items()
            }
            for row in csv.DictReader(file)
        ]  # fmt: skip
    return rows, json.loads((out / "data" / "cures.json").read_text("utf-8"))


def require_same(out: Path, data: str, settings: dict[str, Any]) -> None:
    """Check that rows which are there already were obtained with these settings and versions.

    Another processor is accepted: `require_equal_runs` says whether it makes other runs.

    Args:
        out: the directory.
        data: the data's name.
        settings: what is to be run.

    Raises:
        BadParameter: there are none, or they were not.
    """
    _, about = read(out)
    found = {name: value for name, value in about.get(data, {}).items() if name != "seconds"}
    wanted = json.loads(json.dumps(settings))
    for each in (found, wanted):
        each.pop(ELSEWHERE, None)
        each["machine"] = {name: value for name, value in each.get("machine", {}).items() if name not in _HARDWARE}
    differ = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if differ:
        raise typer.BadParameter(
            f"{out}: its rows of {data} were obtained with other {', '.join(differ)}; run all methods anew, without "
            "--methods."
        )


def require_equal_runs(out: Path, rows: Sequence[Row]) -> None:
    """Check that DPO's tuning runs came out as a directory has them: then its other rows would too.

    To five digits, and on another processor to `ROUNDING`: rounding is then carried on step by step.

    Args:
        out: the directory.
        rows: of this call so far.

    Raises:
        BadParameter: they did not.
    """
    names = ("data", "optimizer", "style", "step", "rate")

    def tuned(of: Sequence[Row]) -> dict[tuple[Any, ...], tuple[float, float]]:
        picked = [row for row in of if row["phase"] == "rate" and row["method"] == "DPO"]
        return {tuple(row[name] for name in names): (row["chosen"], row["rejected"]) for row in picked}

    stored, about = read(out)
    before, here = tuned(stored), machine()["processor"]
    same = {row["data"]: about[row["data"]]["machine"]["processor"] == here for row in rows}
    for key, values in tuned(rows).items():
        known = before.get(key, (math.nan, math.nan))
        digits = 1e-5 if same[key[0]] else ROUNDING
        if not all(math.isclose(one, other, rel_tol=digits) for one, other in zip(known, values, strict=True)):
            raise typer.BadParameter(
                f"DPO's run of {key} comes out as {values}, and {out} has {known}; run all methods anew, without "
                "--methods."
            )


def write(
    out: Path, rows: Sequence[Row], about: dict[str, Any], methods: Sequence[str] = ()
) -> tuple[list[Row], dict[str, Any]]:
    """Put a run's rows in the place of an earlier one's.

    Args:
        out: the directory.
        rows: of one data.
        about: its settings, under its name.
        methods: if not empty, rows of other methods stay too.

    Returns:
        All rows and settings that are in the files now, as `read` gives them.
    """
    kept, others = read(out)
    mine = {row["data"] for row in rows}
    new = [row for row in rows if not methods or row["method"] in methods]  # DPO's tuning runs are there already
    if methods:
        for data in mine:
            there = others[data]
            elsewhere = dict(there.get(ELSEWHERE, {}))
            for method in methods:
                elsewhere.pop(method, None)
                if about[data]["machine"]["processor"] != there["machine"]["processor"]:
                    elsewhere[method] = about[data]["machine"]["processor"]
            about[data] = {**there, "seconds": there["seconds"] + about[data]["seconds"], ELSEWHERE: elsewhere}
    kept = [row for row in kept if row["data"] not in mine or (methods and row["method"] not in methods)]
    if kept:
        print(f"{out / 'data' / 'cures.csv'}: the rows of {', '.join(sorted({row['data'] for row in kept}))} stay.")
    (out / "data").mkdir(parents=True, exist_ok=True)
    with (out / "data" / "cures.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_cells([*kept, *new]))
    text = json.dumps({**others, **about}, indent=1, ensure_ascii=False)
    (out / "data" / "cures.json").write_text(text + "\n", encoding="utf-8")
    return read(out)


def _cells(rows: Iterable[Row]) -> Iterable[Row]:
    for row in sorted(rows, key=lambda row: row["data"]):
        yield {
            name: value if isinstance(value, str) else "" if math.isnan(value) else f"{value:.6g}"
            for name, value in row.items()
        }
