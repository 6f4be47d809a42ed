"""gradent inside Axolotl, by the recipe of docs/recipes.md: `scripts/clients/axolotl.sh`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

import axolotl.core.builders.rl  # noqa: F401  (imported once, before processes are forked)
import axolotl.loaders.adapter  # noqa: F401
from axolotl.cli.train import do_cli

from scripts.clients.runs import Case, Outcome, main, recipe
from scripts.clients.tiny import PAIRS, write_lines

# rpo_alpha and sample_packing are refused by Axolotl under rl.
FULL = {"adapter": None, "learning_rate": 1e-4}
CASES = [
    Case("dpo-lora"),
    Case("dpo-full", FULL),
    Case("dpo-checkpointing", {"gradient_checkpointing": True}),
    Case("ipo", {"rl": "ipo"}),
    Case("simpo", {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 0.5}),
    Case("orpo", {"rl": "orpo", "orpo_alpha": 0.1}, source="measure", weighs_alike=False),
    Case("kto", {"rl": "kto", "remove_unused_columns": False}, kind="rows"),
    Case("padding-free", {"dpo_padding_free": True}),
]


def run(case: Case, folder: Path, watched: bool) -> Outcome:
    """Train as `axolotl train` does, without or with the recipe's plugin."""
    kind = case.settings.get("rl", "dpo")
    rows: list[dict[str, Any]] = PAIRS
    how: dict[str, Any] = {"type": {
        "field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected", "prompt_format": "{prompt}",
        "chosen_format": " {chosen}", "rejected_format": " {rejected}",
    }}  # fmt: skip
    if kind == "kto":
        rows = [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in PAIRS for side in ("chosen", "rejected")
        ]  # fmt: skip
        how = {"type": {
            "field_prompt": "prompt", "field_completion": "completion", "field_label": "label",
            "prompt_format": "{prompt}", "completion_format": " {completion}",
        }}  # fmt: skip
    if kind == "orpo":
        rows = [
            {side: [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
             for side in ("chosen", "rejected")} for pair in PAIRS
        ]  # fmt: skip
        how = {"type": "chat_template.argilla"}
    data = write_lines(folder / "data.jsonl", rows)
    for name in ("out", "prepared"):
        shutil.rmtree(folder / name, ignore_errors=True)
    settings = {
        "base_model": str(folder.parents[1] / "my-model"), "rl": "dpo", "rl_beta": 0.1,
        "datasets": [{"path": str(data), "ds_type": "json", "split": "train", **how}],
        "dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / "out"), "sequence_len": 256,
        "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 10, "logging_steps": 1,
        "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_linear": True,
        "learning_rate": 1e-3, "lr_scheduler": "constant", "optimizer": "adamw_torch", "bf16": False, "fp16": False,
        "tf32": False, "gradient_checkpointing": False, "flash_attention": False, "sdp_attention": True,
        "save_steps": 1000, "seed": 3, "max_grad_norm": 1e9, "dataset_processes": 1, "dataloader_num_workers": 0,
        "special_tokens": {"pad_token": "<pad>"}, **case.settings,
    }  # fmt: skip
    if watched:
        (folder / "my_plugins").mkdir(exist_ok=True)
        (folder / "my_plugins" / "__init__.py").touch()
        source = recipe("from axolotl.integrations.base import BasePlugin")
        (folder / "my_plugins" / "entanglement.py").write_text(source, "utf-8")
        settings["plugins"] = ["my_plugins.entanglement.EntanglementPlugin"]
    config = folder / "my_dpo.yaml"
    config.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}), "utf-8")
    do_cli(config=str(config))
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    return Outcome(folder / "out", [checkpoint / "trainer_state.json"])


if __name__ == "__main__":
    main("axolotl", CASES, run, ["axolotl", "transformers", "trl", "peft", "accelerate", "torch"])
