"""The callback under every release of TRL and transformers that is admitted: what `make test-oldest` runs as well."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import DPOConfig, DPOTrainer

from gradent import EntanglementCallback
from tests.truth import scaled_error, truth

ROWS = [
    {"prompt": f"Question {n}:", "chosen": f" yes, {'very ' * (n % 3)}much", "rejected": f" no{'!' * (n % 4)}"}
    for n in range(8)
]


def train(model: nn.Module, tokenizer: Any, out: Path, callbacks: list[Any], **settings: Any) -> DPOTrainer:
    """Three steps of DPO; settings that a release does not know are left out."""
    wanted = {
        "output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
        "max_length": 64, "disable_tqdm": True, "seed": 3, **settings,
    }  # fmt: skip
    known = inspect.signature(DPOConfig).parameters
    torch.manual_seed(0)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(**{name: value for name, value in wanted.items() if name in known}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_dpo(tiny_llama, tiny_tokenizer, tmp_path, checkpointing, accumulation):
    settings = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": accumulation}
    callback = EntanglementCallback(every=1, on_error="raise")
    fresh = copy.deepcopy(tiny_llama)
    watched = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [callback], **settings)
    bare = train(copy.deepcopy(tiny_llama), tiny_tokenizer, tmp_path, [], **settings)
    pairs = zip(watched.model.parameters(), bare.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert [record.source for record in callback.records] == ["piggyback"] * 3
    first = callback.records[0]
    assert len(first.gram) == 2 * accumulation
    assert scaled_error(first.gram, truth(fresh, first.batch)) <= 1e-5
    # At the first step the policy is its reference: d_w = d_l = β σ(0).
    torch.testing.assert_close(first.verdict.d_w, torch.full_like(first.verdict.d_w, 0.05), rtol=1e-4, atol=0)
    torch.testing.assert_close(first.verdict.d_l, first.verdict.d_w, rtol=1e-4, atol=0)
    logged = [entry for entry in watched.state.log_history if "gradent/cosine" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]


def test_what_did_not_move_is_not_said_to_have_moved(tiny_llama, tiny_tokenizer, tmp_path):
    """With a learning rate of zero nothing moves, whatever noise dropout puts on the training forward."""
    tiny_llama.config.attention_dropout = 0.3
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.3
    callback = EntanglementCallback(every=1, realised=True, on_error="raise")
    train(tiny_llama, tiny_tokenizer, tmp_path, [callback], learning_rate=0.0, disable_dropout=False)
    for record in callback.records:
        assert record.chosen_realised.abs().max() == 0
        assert record.rejected_realised.abs().max() == 0
