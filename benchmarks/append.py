"""Committed results: one CSV a benchmark, a line a run, with commit, machine and versions."""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from gradent.kernels.crossover import device_name

__all__ = ["append"]

RESULTS = Path(__file__).parent / "results"


def append(name: str, figures: Mapping[str, Any]) -> Path:
    """Append a line to a benchmark's CSV.

    Args:
        name: of the benchmark.
        figures: column to value; floats are rounded to 5 digits.

    Returns:
        The file.
    """
    asked = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    git = subprocess.run(asked, capture_output=True, text=True, check=False)
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip() or "unknown",
        "device": device,
        "cores": os.cpu_count(),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        **{key: f"{value:.5g}" if isinstance(value, float) else value for key, value in figures.items()},
    }
    path = RESULTS / f"{name}.csv"
    fresh = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    return path
