"""The same run on two processes: rank 0 has the pairs of both.

    python examples/two_processes.py

starts `torchrun --nproc_per_node 2` on this file; `accelerate launch --num_processes 2` does as well.
"""

import gc
import os
import subprocess
import sys
import tempfile
from copy import deepcopy

import torch
from rich.console import Console
from tiny import make_model, make_pairs, make_tokenizer
from trl import DPOConfig, DPOTrainer

from gradent import EntanglementCallback


def train() -> None:
    """One rank's part."""
    torch.manual_seed(0)
    callback = EntanglementCallback(every=1)
    with tempfile.TemporaryDirectory() as out:
        model = make_model()
        trainer = DPOTrainer(
            model=model,
            ref_model=deepcopy(model),
            args=DPOConfig(
                output_dir=out, max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to="none",
                use_cpu=not torch.cuda.is_available(), bf16=False, disable_tqdm=True,
            ),
            train_dataset=make_pairs(),
            processing_class=make_tokenizer(),
            callbacks=[callback],
        )  # fmt: skip
        trainer.train()
    if trainer.is_world_process_zero():
        pairs = [len(record.gram) for record in callback.records]
        Console().print(f"{trainer.args.world_size} processes of 4 pairs a step; pairs in each record: {pairs}")


def main() -> None:
    """Launch two processes, or be one of them."""
    if "RANK" in os.environ:
        train()
        gc.collect()  # the trainer's hold on the process group goes before the group does
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
