"""gradent inside OpenRLHF, by the recipe of docs/recipes.md: `scripts/clients/openrlhf.sh`.

OpenRLHF is made for GPUs. Here it runs on a CPU: one process, ZeRO-2 by DeepSpeed with torch's AdamW, in float32, which
its command line does not offer, so that the truth can be told to float32's precision.
"""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import socket
import sys
import types
from pathlib import Path
from typing import Any

import torch

# Needs a GPU to be built; OpenRLHF imports these for packed rows and ring attention alone.
for _name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"):
    sys.modules[_name] = types.ModuleType(_name)
    sys.modules[_name].__spec__ = importlib.machinery.ModuleSpec(_name, None)
for _name in ("index_first_axis", "pad_input", "rearrange", "unpad_input"):
    setattr(sys.modules["flash_attn.bert_padding"], _name, None)
sys.modules["flash_attn.utils.distributed"].all_gather = None  # type: ignore[attr-defined]

import deepspeed.comm.torch
import openrlhf.utils.deepspeed.deepspeed as strategies
import openrlhf.utils.utils as dtypes
from deepspeed.utils import safe_get_full_grad
from openrlhf.trainer import dpo_trainer

from scripts.clients.runs import Case, Outcome, main, recipe
from scripts.clients.tiny import PAIRS, write_lines
from scripts.clients.watch import Step, Watch

LORA = ["--ds.lora.rank", "4", "--adam.lr", "1e-3"]
CASES = [
    Case("dpo-lora", {"words": LORA}),
    Case("dpo-full"),
    Case("dpo-checkpointing", {"words": ["--model.gradient_checkpointing_enable"]}),
    Case("rpo", {"words": [*LORA, "--model.nll_loss_coef", "1.0"]}),
    Case("ipo", {"words": [*LORA, "--model.ipo_enable"]}),
    Case("label-smoothing", {"words": [*LORA, "--model.label_smoothing", "0.1"]}),
]


def run(case: Case, folder: Path, watched: bool) -> Outcome:
    """Train as `python -m openrlhf.cli.train_dpo` does, or by the recipe's script."""
    _use_cpu()
    (folder / "data").mkdir(exist_ok=True)
    rows = [{"prompt": p["prompt"], "chosen": f" {p['chosen']}", "rejected": f" {p['rejected']}"} for p in PAIRS]
    write_lines(folder / "data" / "train.jsonl", rows)
    for name in ("out", "board"):
        shutil.rmtree(folder / name, ignore_errors=True)
    sys.argv = [
        "train_dpo.py", "--model.model_name_or_path", str(folder.parents[1] / "my-model"),
        "--data.dataset", str(folder / "data"), "--data.prompt_key", "prompt", "--data.max_len", "256",
        "--train.micro_batch_size", "2", "--train.batch_size", "4", "--ds.attn_implementation", "sdpa",
        "--adam.lr", "1e-4", "--lr_warmup_ratio", "0.0", "--max_norm", "0", "--ckpt.output_dir", str(folder / "out"),
        "--ckpt.path", str(folder / "checkpoints"), "--logger.tensorboard_dir", str(folder / "board"),
        "--logger.wandb.run_name", "run", *case.settings.get("words", []),
    ]  # fmt: skip
    source = recipe("from openrlhf.trainer import dpo_trainer")
    head, start = source.split('if __name__ == "__main__":\n')
    names: dict[str, Any] = {"__name__": "train_dpo"}
    exec(compile(head, "train_dpo.py", "exec"), names)
    if watched:
        _watch(names["WatchedDPOTrainer"])
    else:
        names["WatchedDPOTrainer"] = dpo_trainer.DPOTrainer
    exec(compile("if True:\n" + start, "train_dpo.py", "exec"), names)
    return Outcome(folder / "out", sorted((folder / "board" / "run").iterdir()))


def _watch(trainer: Any) -> None:
    """Note the steps of a trainer, its weights and full gradients, for `_examine`."""
    watch, fit, tell = Watch.found, trainer.fit, trainer.tell
    noted = types.SimpleNamespace(records=[], errors=0)

    def watched_fit(self: Any, *args: Any, **kwargs: Any) -> None:
        model = self.strategy._unwrap_model(self.model)  # noqa: SLF001  (as the recipe)
        self.processing_class = self.tokenizer
        watch.trainer = self
        watch.follow(model)
        fit(self, *args, **kwargs)

    def watched_tell(self: Any, record: Any) -> None:
        weights = {name: part.detach().clone() for name, part in watch.trained().items()}
        step = Step(weights, rows=watch.take_rows())
        step.grads = {name: safe_get_full_grad(part).clone() for name, part in watch.trained().items()}
        watch.steps[record.step] = step
        noted.records.append(record)
        tell(self, record)

    trainer.fit, trainer.tell = watched_fit, watched_tell
    watch.callbacks.append(noted)


def _use_cpu() -> None:
    """Have OpenRLHF and DeepSpeed run on a CPU, in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "-1",
    }
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = torch.cuda.set_device = lambda *args: None  # type: ignore[assignment]
    deepspeed.comm.torch.build_shm_op = lambda: None  # compiles for minutes, to spare copies between processes
    mesh = strategies.init_device_mesh
    strategies.init_device_mesh = lambda device, *args, **kwargs: mesh("cpu", *args, **kwargs)
    dtypes.convert_to_torch_dtype = lambda name: torch.float32
    for module in (sys.modules["openrlhf.models.actor"],):
        if hasattr(module, "convert_to_torch_dtype"):
            module.convert_to_torch_dtype = lambda name: torch.float32
    for name in ("get_train_ds_config", "get_eval_ds_config"):
        setattr(strategies, name, _for_cpu(getattr(strategies, name)))


def _for_cpu(make: Any) -> Any:
    """The configuration of DeepSpeed without what is left to a GPU's launcher."""

    def made(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = make(*args, **kwargs)
        zero = config["zero_optimization"]
        config["zero_optimization"] = {name: value for name, value in zero.items() if value != "auto"}
        config["bf16"] = {"enabled": False}
        if "optimizer" in config:
            config["optimizer"]["params"]["torch_adam"] = True
        return config

    return made


if __name__ == "__main__":
    main("openrlhf", CASES, run, ["openrlhf", "deepspeed", "transformers", "peft", "accelerate", "torch"])
