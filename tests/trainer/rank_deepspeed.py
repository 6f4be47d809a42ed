"""One rank of DPO runs under DeepSpeed, with and without the callback: started by test_wrapped_ranks.py."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback, training_args
from trl import DPOConfig, DPOTrainer

from gradent import EntanglementCallback
from tests.trainer.rank_ddp import leave, pairs, tokenizer
from tests.trainer.rank_fsdp1 import Lines
from tests.truth import scaled_error, truth
from tests.zoo import build

STEPS = 2
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 1}

# By name: the stage, the callback's options, the trainer's arguments, and what DeepSpeed is told besides.
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ZeRO-1": (1, {"realised": True}, {}, {}),
    "ZeRO-2, accumulated": (2, {"realised": True}, {"gradient_accumulation_steps": 2}, {}),
    "ZeRO-2, LoRA": (2, {"realised": True}, {"lora": True}, {}),
    "ZeRO-2, a pass of its own": (2, {}, {"ld_alpha": 0.5}, {}),
    "ZeRO-2, measure": (2, {"mode": "measure", "realised": True}, {}, {}),
    "ZeRO-2, bf16": (2, {}, {"bf16": True}, {"bf16": {"enabled": True}}),
    "ZeRO-2, fp16": (2, {}, {"fp16": True}, {"fp16": {"enabled": True, "initial_scale_power": 8}}),
    "ZeRO-3": (3, {"realised": True}, {}, {}),
    "ZeRO-3, accumulated": (3, {}, {"gradient_accumulation_steps": 2}, {}),
    "ZeRO-3, recomputed": (3, {}, {"gradient_checkpointing": True}, {}),
    "ZeRO-3, reentrant": (3, {}, REENTRANT, {}),
    "ZeRO-3, LoRA": (3, {}, {"lora": True}, {}),
    "ZeRO-3, LoRA, reentrant": (3, {}, {"lora": True, **REENTRANT}, {}),
    "ZeRO-3, bf16": (3, {}, {"bf16": True}, {"bf16": {"enabled": True}}),
    "ZeRO-3, measure": (3, {"mode": "measure"}, SYNCED, {}),
}


@contextlib.contextmanager
def whole(model: nn.Module) -> Any:
    """With every parameter whole, as ZeRO-3 has it for no more than this."""
    import deepspeed  # noqa: PLC0415  (not among gradent's own pins)

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    with whole(model):
        return {name: part.detach().float().clone() for name, part in model.named_parameters()}


class Weights(TrainerCallback):
    """Keeps the weights before every step, and after the last."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(weights_of(kwargs["model"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(weights_of(kwargs["model"]))


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def run(out: Path, name: str, watched: bool) -> dict[str, Any]:
    stage, options, arguments, told = RUNS[name]
    arguments = dict(arguments)
    has_lora = arguments.pop("lora", False)
    accumulated = arguments.get("gradient_accumulation_steps", 1)
    torch.manual_seed(0)
    model, plain, reference = (build("llama", dtype=torch.float32) for _ in range(3))
    if has_lora:
        plain = get_peft_model(plain, lora())
    lines, logger = Lines(), logging.getLogger("gradent")
    logger.addHandler(lines)
    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulated, "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}, **told,
    }  # fmt: skip
    settings = {
        "output_dir": str(out / "run"), "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": "none", "bf16": False, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, "deepspeed": config, **arguments,
    }  # fmt: skip
    args = DPOConfig(**settings)
    tell_ranks()
    callback, weights = EntanglementCallback(every=1, alert=None, **options), Weights()
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=pairs(), processing_class=tokenizer(),
        ref_model=None if has_lora else reference, callbacks=[weights, *([callback] if watched else [])],
        **({"peft_config": lora()} if has_lora else {}),
    )  # fmt: skip
    trainer.train()
    logger.removeHandler(lines)
    assert trainer.is_deepspeed_enabled and type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    flat = b"".join(part.numpy().tobytes() for part in weights.seen[-1].values())
    torch.nn.functional.linear = torch._C._nn.linear  # noqa: SLF001  (ZeRO-3 leaves its own behind)
    return {
        "weights": hashlib.sha256(flat).hexdigest(), "said": lines.said, "errors": callback.errors,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "records": [compare(record, plain, weights.seen) for record in callback.records],
    }  # fmt: skip


def compare(record: Any, plain: nn.Module, seen: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A record beside plain autograd with the weights of its step, and of the next."""
    batch, true = record.batch, []
    for number in (record.step - 1, record.step):
        plain.load_state_dict(seen[number], strict=False)
        true.append(truth(plain, batch))
    found = {
        "source": record.source, "pairs": len(record.gram), "error": scaled_error(record.gram, true[0]),
        "d_w": record.verdict.d_w.tolist(), "realised": None,
    }  # fmt: skip
    if record.chosen_realised is not None:
        change = true[1].chosen_logp - true[0].chosen_logp
        found["realised"] = [float((record.chosen_realised - change).abs().max()), float(change.abs().min())]
    return found


def tell_ranks() -> None:
    """accelerate takes a run on a CPU for one process, whatever DeepSpeed has started."""
    from accelerate.state import PartialState  # noqa: PLC0415  (made when the arguments are)

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    PartialState._shared_state.update(num_processes=world, process_index=rank, local_process_index=rank)  # noqa: SLF001


def main(out: Path, names: list[str]) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    from deepspeed.accelerator import get_accelerator  # noqa: PLC0415  (not among gradent's own pins)

    get_accelerator().is_fp16_supported = lambda: True
    training_args.is_torch_bf16_gpu_available = lambda: True  # which asks for a GPU, that DeepSpeed does not need
    seen = {name: [run(out, name, watched) for watched in (False, True)] for name in names}
    leave(out, int(torch.distributed.get_rank()), seen)
