"""One rank of a GRPO run under DDP, started by test_group_ranks.py; writes what it has seen."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from trl import GRPOConfig, GRPOTrainer

from gradent import EntanglementCallback
from tests.conftest import make_tokenizer
from tests.trainer.rank_ddp import leave
from tests.trainer.rollouts import make_rollouts
from tests.trainer.runs import llama

STEPS = 2


def main(out: Path, watched: bool, batch: int) -> None:
    torch.set_num_threads(1)
    model = llama()
    callback = EntanglementCallback(every=1, realised=True, out=out / "records", on_error="raise", alert=None)
    trainer = make_rollouts(
        (GRPOTrainer, GRPOConfig), model, make_tokenizer(), out / "run", [callback] if watched else [],
        max_steps=STEPS, per_device_train_batch_size=batch, learning_rate=0.001,
    )  # fmt: skip
    trainer.train()
    state = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    steps = []
    for record in callback.records:
        rows, account = record.rows, record.attribution
        ids, mask = record.batch.input_ids, record.batch.attention_mask.bool()
        steps.append({
            "ids": [ids[row][mask[row]].tolist() for row in range(len(rows))],
            "marks": [record.batch.completion_mask[row][mask[row]].tolist() for row in range(len(rows))],
            "weight": rows.weight.tolist(), "group": rows.group.tolist(), "products": rows.products.tolist(),
            "total": account.total.tolist(), "explained": account.explained, "whole": account.is_whole,
            "moved": {source: values.tolist() for source, values in rows.moved.items()},
            "counts": [record.groups, record.flat_groups, record.inactive],
        })  # fmt: skip
    logs = [{k: v for k, v in entry.items() if "gradent" in k} for entry in trainer.state.log_history]
    seen = {"weights": hashlib.sha256(state).hexdigest(), "steps": steps, "logs": logs}
    leave(out, trainer.args.process_index, seen)
