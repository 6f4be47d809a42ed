"""One rank of a step under FSDP2: started by test_ranks.py; writes its worst scaled error by case."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gradent.recorder import attach
from tests.adapters import lora_everywhere
from tests.batches import ragged
from tests.hooks.piggyback.test_watcher import prepare
from tests.trainer.rank_ddp import leave
from tests.trainer_steps import through_fused_head, through_logits, with_fused_head
from tests.truth import scaled_error, truth
from tests.zoo import build

MODELS = ("llama", "llama, biases, tied", "gpt2")
WAYS = {"logits": through_logits, "fused head": through_fused_head}


def make(name: str, lora: bool) -> nn.Module:
    return lora_everywhere(name, torch.float32) if lora else build(name, dtype=torch.float32)


def run(name: str, lora: bool, way: str, reentrant: bool | None) -> float:
    """The scaled error of a step's entries on a sharded model."""
    model = prepare(make(name, lora), reentrant)
    if way == "fused head":
        with_fused_head(model)
    batch = ragged().select([0, 1] if dist.get_rank() == 0 else [2, 1])
    true = truth(make(name, lora), batch)
    base = model.get_base_model() if lora else model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in base.transformer.h if name == "gpt2" else base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with attach(model, mode="piggyback") as recorder:
        WAYS[way](model, batch).backward()
        found = recorder.harvest()
    assert found is not None
    return scaled_error(found.gram, true)


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    errors = {
        f"{name}, {'LoRA' if lora else 'full'}, {way}, reentrant={reentrant}": run(name, lora, way, reentrant)
        for name in MODELS
        for lora in (False, True)
        for way in WAYS
        for reentrant in (None, False, True)
    }
    leave(out, dist.get_rank(), errors)
