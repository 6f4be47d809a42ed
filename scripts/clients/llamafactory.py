"""gradent inside LLaMA-Factory, by the recipe of docs/recipes.md: `scripts/clients/llamafactory.sh`."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import yaml

# Its wheels need CUDA's libraries; LLaMA-Factory imports it for audio files, of which there are none here.
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from llamafactory.train.dpo import trainer as _dpo  # noqa: F401  (imported once, before processes are forked)
from llamafactory.train.kto import trainer as _kto  # noqa: F401
from llamafactory.train.tuner import run_exp
from trl.models.modeling_value_head import ValueHead

from scripts.clients.runs import Case, Outcome, main, recipe
from scripts.clients.tiny import PAIRS, write_lines

FULL = {"finetuning_type": "full", "learning_rate": 1e-4}
CASES = [
    Case("dpo-lora"),
    Case("dpo-full", FULL),
    Case("dpo-checkpointing", {"disable_gradient_checkpointing": False}),
    Case("rpo", {"pref_ftx": 1.0}),
    Case("simpo", {"pref_loss": "simpo"}),
    Case("orpo", {"pref_loss": "orpo"}),
    Case("ipo", {"pref_loss": "ipo"}),
    Case("hinge", {"pref_loss": "hinge"}),
    Case("ld-alpha", {"ld_alpha": 0.5}, source="measure", weighs_alike=False),
    Case("kto", {"stage": "kto", "dataset": "kto"}, kind="rows"),
    Case("reward", {"stage": "rm"}, kind="reward"),
    Case("packing", {"packing": True}),
]


def run(case: Case, folder: Path, watched: bool) -> Outcome:
    """Train as `llamafactory-cli train` does, or by the recipe's script."""
    data = folder.parents[1] / "lf-data"
    data.mkdir(exist_ok=True)
    write_lines(data / "pairs.jsonl", PAIRS)
    labelled = [
        {"prompt": pair["prompt"], "response": pair[side], "label": side == "chosen"}
        for pair in PAIRS for side in ("chosen", "rejected")
    ]  # fmt: skip
    write_lines(data / "kto.jsonl", labelled)
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns},
        "kto": {"file_name": "kto.jsonl", "columns": {"prompt": "prompt", "response": "response", "kto_tag": "label"}},
    }
    (data / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    settings = {
        "model_name_or_path": str(folder.parents[1] / "my-model"), "stage": "dpo", "do_train": True,
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "dataset": "pairs", "dataset_dir": str(data),
        "template": "default", "cutoff_len": 256, "overwrite_cache": True, "preprocessing_num_workers": 1,
        "output_dir": str(folder / "out"), "overwrite_output_dir": True, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 10, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_steps": 1000, "report_to": "none", "max_grad_norm": 1e9, "seed": 3, "use_cpu": True,
        "disable_gradient_checkpointing": True, **case.settings,
    }  # fmt: skip
    if case.kind == "reward":
        _make_quiet()
    (folder / "my_dpo.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    sys.argv = ["train.py", "my_dpo.yaml"]
    if watched:
        exec(
            compile(recipe("from llamafactory.train.tuner import run_exp"), "train.py", "exec"),
            {"__name__": "__main__"},
        )
    else:
        run_exp()
    return Outcome(folder / "out", [folder / "out" / "trainer_state.json"])


def _make_quiet() -> None:
    """Take the dropout out of value heads, of whose noise the truth knows nothing."""
    make = ValueHead.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.dropout = torch.nn.Identity()

    ValueHead.__init__ = made


if __name__ == "__main__":
    main("llamafactory", CASES, run, ["llamafactory", "transformers", "trl", "peft", "accelerate", "torch"])
