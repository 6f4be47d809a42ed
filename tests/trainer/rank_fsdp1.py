"""One rank of DPO runs under FSDP 1, with and without the callback: started by test_wrapped_ranks.py."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig
from torch.distributed.fsdp import FullyShardedDataParallel
from trl import DPOConfig, DPOTrainer

from gradent import EntanglementCallback
from tests.trainer.rank_ddp import leave, pairs, tokenizer
from tests.zoo import build

STEPS = 2
PROBE = [{"prompt": "w3 w4", "chosen": " w5", "rejected": " w6 w7"}]
EVERYTHING: dict[str, Any] = {"realised": True, "tokens_every": 1, "probe_data": PROBE, "probe_every": 1}

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "everything": ({}, EVERYTHING, {}),
    "measure": ({}, {"mode": "measure"}, {}),
    "metric": ({}, {"metric": "adam"}, {}),
    "a pass of its own": ({}, {}, {"ld_alpha": 0.5}),
    "LoRA": ({}, {}, {"lora": True}),
    "flat": ({"use_orig_params": False}, EVERYTHING, {}),
    "not sharded": ({"sharding_strategy": "NO_SHARD"}, {}, {}),
}


class Lines(logging.Handler):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "gradent":
            self.said.append(record.getMessage())


def run(out: Path, name: str, watched: bool) -> dict[str, Any]:
    plugin, options, arguments = RUNS[name]
    arguments = dict(arguments)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft = {"peft_config": lora} if arguments.pop("lora", False) else {}
    lines, logger = Lines(), logging.getLogger("gradent")
    logger.addHandler(lines)
    callback = EntanglementCallback(every=1, alert=None, **options)
    settings = {
        "output_dir": str(out / "run"), "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "learning_rate": 1e-3, "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, **arguments,
    }  # fmt: skip
    trainer = DPOTrainer(
        model=build("llama", dtype=torch.float32), args=DPOConfig(**settings), train_dataset=pairs(),
        ref_model=None if peft else build("llama", dtype=torch.float32), processing_class=tokenizer(),
        callbacks=[callback] if watched else [], **peft,
    )  # fmt: skip
    # accelerate makes no FSDP on a CPU, and so it is told of it here.
    state = AcceleratorState._shared_state  # noqa: SLF001
    before = dict(state)
    state["distributed_type"] = DistributedType.FSDP
    state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=1, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False, sync_module_states=False,
        **{"use_orig_params": True, **plugin},
    )  # fmt: skip
    trainer.is_fsdp_enabled = True
    trainer.train()
    state.clear()
    state.update(before)
    logger.removeHandler(lines)
    flat = b"".join(part.detach().numpy().tobytes() for part in trainer.model.parameters())
    return {
        "weights": hashlib.sha256(flat).hexdigest(), "kind": type(trainer.model).__name__, "said": lines.said,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "records": len(callback.records), "errors": callback.errors,
    }  # fmt: skip


def main(out: Path) -> None:
    torch.set_num_threads(1)
    make = FullyShardedDataParallel.__init__

    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "device_id": torch.device("cpu")})

    FullyShardedDataParallel.__init__ = on_cpu  # type: ignore[method-assign]
    seen = {name: [run(out, name, watched) for watched in (False, True)] for name in RUNS}
    leave(out, int(torch.distributed.get_rank()), seen)
