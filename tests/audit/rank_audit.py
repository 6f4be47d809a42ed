"""An audit on every rank of a launcher: `rank_audit.py RUN DATA BASE OUT`."""

from __future__ import annotations

import os
import sys

import torch

from gradent import audit

if __name__ == "__main__":
    run, data, base, out = sys.argv[1:]
    torch.set_num_threads(1)
    result = audit(
        run, data, base=base, out=out, batch_size=2, token_pairs=3, device="cpu", report=False, quiet=True
    )  # fmt: skip
    assert result.summary["complete"]
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's destructor can hang
