"""Committed results: one CSV a benchmark, a line a run, with commit, machine and versions."""

from __future__ import annotations

import csv
import datetime
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from gradent.kernels.availability import device_name

__all__ = ["RESULTS", "append"]

RESULTS = Path(__file__).parent / "results"


def append(name: str, figures: Mapping[str, Any], *, folder: Path = RESULTS, commit: str | None = None) -> Path:
    """Append a line to a benchmark's CSV.

    Args:
        name: of the benchmark.
        figures: column to value; floats are rounded to 5 digits.
        folder: where the CSV is.
        commit: the code's, for a copy of the tree without its history; None to ask git.

    Returns:
        The file.
    """
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": commit or _commit() or "unknown",
        "device": device,
        "cores": os.cpu_count(),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        **{key: f"{value:.5g}" if isinstance(value, float) else value for key, value in figures.items()},
    }
    path = folder / f"{name}.csv"
    fresh = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    return path


def _commit() -> str:
    """Of the tree that this file is in; "" without git or without a history."""
    if shutil.which("git") is None:
        return ""
    asked = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
