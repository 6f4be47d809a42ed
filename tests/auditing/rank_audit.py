"""An audit on every rank of a launcher, started by test_audit_ranks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from gradent import audit


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
