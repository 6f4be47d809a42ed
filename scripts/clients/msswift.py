"""gradent inside ms-swift, by the recipe of docs/recipes.md: `scripts/clients/msswift.sh`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import swift.rlhf_trainers.cpo_trainer  # noqa: F401  (all imported once, before processes are forked)
import swift.rlhf_trainers.dpo_trainer  # noqa: F401
import swift.rlhf_trainers.kto_trainer  # noqa: F401
import swift.rlhf_trainers.orpo_trainer  # noqa: F401
import swift.rlhf_trainers.reward_trainer  # noqa: F401
from swift.pipelines import rlhf_main

from scripts.clients.runs import Case, Outcome, main, recipe
from scripts.clients.tiny import PAIRS, write_lines

# packing and padding_free ask for flash attention, and so for a GPU: ms-swift refuses them here.
FULL = {"tuner_type": "full", "learning_rate": "1e-4"}
CASES = [
    Case("dpo-lora"),
    Case("dpo-full", FULL),
    Case("dpo-checkpointing", {"gradient_checkpointing": "true"}),
    Case("dpo-default-accumulation", {"gradient_accumulation_steps": None}, batches=8),
    Case("rpo", {"rpo_alpha": "1.0"}),
    Case("simpo", {"rlhf_type": "simpo"}),
    Case("cpo", {"rlhf_type": "cpo"}),
    Case("orpo", {"rlhf_type": "orpo"}),
    Case("ld-alpha", {"ld_alpha": "0.5"}, source="measure", weighs_alike=False),
    Case("kto", {"rlhf_type": "kto"}, kind="rows"),
    Case("reward", {"rlhf_type": "rm"}, kind="reward"),
]


def run(case: Case, folder: Path, watched: bool) -> Outcome:
    """Train as `swift rlhf` does, without or with the recipe's plugin."""
    is_kto = case.settings.get("rlhf_type") == "kto"
    pairs, labelled = list[dict[str, Any]](), list[dict[str, Any]]()
    for pair in PAIRS:
        asked = {"role": "user", "content": pair["prompt"]}
        chosen, rejected = ([asked, {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected"))
        pairs.append({"messages": chosen, "rejected_response": pair["rejected"]})
        labelled += [{"messages": chosen, "label": True}, {"messages": rejected, "label": False}]
    data = write_lines(folder / "data.jsonl", labelled if is_kto else pairs)
    shutil.rmtree(folder / "out", ignore_errors=True)
    settings: dict[str, str | None] = {
        "rlhf_type": "dpo", "model": str(folder.parents[1] / "my-model"), "model_type": "llama", "template": "default",
        "torch_dtype": "float32", "dataset": str(data), "tuner_type": "lora", "lora_rank": "4",
        "target_modules": "all-linear", "learning_rate": "1e-3", "max_length": "256", "max_steps": "10",
        "per_device_train_batch_size": "2", "gradient_accumulation_steps": "2", "logging_steps": "1",
        "save_steps": "1000", "report_to": "none", "output_dir": str(folder / "out"), "add_version": "false",
        "max_grad_norm": "1e9", "seed": "3", "lr_scheduler_type": "constant", "warmup_ratio": "0",
        "split_dataset_ratio": "0", "dataset_num_proc": "1", "dataloader_num_workers": "0", "use_cpu": "true",
        "load_from_cache_file": "false", "create_checkpoint_symlink": "false", "gradient_checkpointing": "false",
        **case.settings,
    }  # fmt: skip
    if watched:
        (folder / "entanglement.py").write_text(recipe("from swift.callbacks import callbacks_map"), "utf-8")
        settings |= {"external_plugins": "entanglement.py", "callbacks": "gradent"}
    rlhf_main([word for name, value in settings.items() if value is not None for word in (f"--{name}", value)])
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    return Outcome(checkpoint, [checkpoint / "trainer_state.json", folder / "out" / "logging.jsonl"])


if __name__ == "__main__":
    main("msswift", CASES, run, ["ms-swift", "transformers", "trl", "peft", "accelerate", "torch"])
