"""An audit on every rank of a launcher, started by test_audit_ranks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from gradent import audit
from gradent.pairs.preparation import Preparation


def main(run: Path, data: Path, base: Path, out: Path, batch_size: int = 2) -> None:
    torch.set_num_threads(1)
    result = audit(
        run, data, base=base, out=out, batch_size=batch_size, token_pairs=3, device="cpu", report=False, quiet=True
    )  # fmt: skip
    assert result.summary["complete"]
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's destructor can hang


DAYS = ("warm", "cold")  # words that the tokenizer knows


def apart(run: Path, data: Path, base: Path, out: Path) -> None:
    """An audit whose ranks tokenize differently, as either side of midnight with a template that prints the date."""
    rank, rows = int(os.environ["RANK"]), Preparation.rows

    def other(how: Preparation, tokenizer: Any, prompt: str, completions: Any, **options: Any) -> Any:
        return rows(how, tokenizer, f"{DAYS[rank]} {prompt}", completions, **options)

    Preparation.rows = other
    main(run, data, base, out)
