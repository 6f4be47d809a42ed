"""GRPO and RLOO: products, weights and moves are what float64 autograd says of the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback
from tests.trainer.group_truth import count_none, make
from tests.trainer.runs import llama, with_lora

TOLERANCE = 1e-5
"""Largest error: of a product scaled by the two norms, of a weight by the largest, of a move by the largest part."""

ADAM = {"optim": "adamw_torch", "weight_decay": 0.1, "adam_epsilon": 1e-4}
"""With Adam's own 1e-8, P magnifies parameters whose rows cancel to rounding, and the truth hangs on the processor."""
SETTINGS: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": False},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "two iterations": {"num_iterations": 2, "learning_rate": 0.3, "epsilon": 0.01},
    "KL": {"beta": 0.2, "learning_rate": 0.1},
    "shuffled": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "steps per generation": {"per_device_train_batch_size": 4, "steps_per_generation": 4, "num_iterations": 2},
    "sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
    "temperature": {"temperature": 0.6},
    "temperature, two iterations": {"temperature": 1.7, "num_iterations": 2, "learning_rate": 0.3},
    "truncated": {"mask_truncated_completions": True},
    "Adam": {**ADAM, "mode": "measure"},
    "Adam, shuffled": {**ADAM, "mode": "measure", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "no room": {"memory_budget": 2**16},
    "LoRA": {"lora": True},
}  # fmt: skip


def run(name: str, tokenizer: PreTrainedTokenizerFast, out: Path, **options: Any) -> tuple[Any, EntanglementCallback]:
    names = ("mode", "memory_budget")
    callback = EntanglementCallback(
        every=1, alert=None, realised=True, on_error="raise",
        **{key: options.pop(key) for key in names if key in options},
    )  # fmt: skip
    model = with_lora(llama()) if options.pop("lora", False) else llama()
    trainer = make(name, model, tokenizer, out, [callback], **options)
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_every_row_is_what_autograd_says(
    name: str, setting: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    options = dict(SETTINGS[setting])
    if name == "rloo":
        if setting in ("dapo", "bnpo", "dr_grpo", "sequence"):
            pytest.skip("an option of GRPO")
        options.pop("loss_type", None)
    trainer, callback = run(name, tiny_tokenizer, tmp_path, **options)
    assert [record.step for record in callback.records] == [1, 2, 3]
    temperature = options.get("temperature", 1.0)
    for record in callback.records:
        step, rows = trainer.noted[record.step], record.rows
        g, h = step.gradients(temperature)
        assert len(rows) == len(g) and record.inactive == len(step.rows) - len(g)
        norms = g.norm(dim=1)
        error = ((rows.products - g @ g.T) / torch.outer(norms, norms)).abs()
        met = error.isfinite()
        assert bool(met.all()) or setting in ("no room", "Adam, shuffled") or options.get("gradient_accumulation_steps")
        assert float(error[met].max()) <= TOLERANCE
        assert float((rows.weight - step.weight).abs().max()) <= TOLERANCE * float(step.weight.abs().max())
        assert torch.equal(rows.group, step.group)
        assert rows.length.tolist() == [int(marks.sum()) for _, marks, _ in step.active]
        is_adam = options.get("optim") == "adamw_torch"
        if is_adam and record.step == 1:
            assert rows.moved is None  # Adam has no second moment yet
            continue
        moved = step.account(g, h, is_new=is_adam)
        largest = torch.stack([part.abs() for part in moved.values()]).max()
        if setting == "Adam, shuffled":
            continue
        for source, want in moved.items():
            assert float((rows.moved[source] - want).abs().max() / largest) <= TOLERANCE, source
        assert record.attribution.is_whole


def test_groups_without_contrast_are_counted(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer, callback = run("grpo", tiny_tokenizer, tmp_path, reward=count_none)
    assert [(len(record.rows), record.inactive, record.groups, record.flat_groups) for record in callback.records] == [
        (0, 8, 0, 2)
    ] * 3
    (first, *_) = [entry for entry in trainer.state.log_history if "gradent/inactive" in entry]
    assert first["gradent/inactive"] == first["gradent/group/without_contrast"] == 1
    assert not [key for key in first if key.startswith("gradent/group/p")]
