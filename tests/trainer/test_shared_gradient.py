"""`weight_grad="shared"` in a real trainer: the run differs by rounding alone, and so do the figures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback, attach
from gradent.errors import InputError
from tests.trainer.runs import llama, make_trainer, weights_of, with_lora

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "AdamW, clipped": {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0},
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_differs_by_rounding_alone(
    name: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(**options: Any) -> tuple[torch.Tensor, EntanglementCallback]:
        model = with_lora(llama()) if lora else llama()
        callback = EntanglementCallback(every=1, on_error="raise", **options)
        trainer = make_trainer("dpo", model, tiny_tokenizer, tmp_path, [callback], max_steps=3, **RUNS[name])
        trainer.train()
        return torch.cat([weight.flatten() for weight in weights_of(trainer.model).values()]), callback

    (own, plain), (shared, callback) = run(), run(weight_grad="shared")
    assert "no weight gradient to share" not in caplog.text
    assert float((own - shared).norm() / own.norm()) <= 1e-5
    for one, other in zip(plain.records, callback.records, strict=True):
        assert other.source == "piggyback"
        torch.testing.assert_close(other.gram.cosine, one.gram.cosine, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other.gram.chosen_sq, one.gram.chosen_sq, rtol=1e-3, atol=0)


def test_where_nothing_is_shared_it_is_said(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = EntanglementCallback(every=1, on_error="raise", mode="measure", weight_grad="shared")
    with caplog.at_level(logging.WARNING, "gradent"):
        make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback], max_steps=2).train()
    assert caplog.text.count("no weight gradient to share") == 1


def test_what_is_accepted() -> None:
    with pytest.raises(InputError, match="weight_grad='ours' is unknown; accepted are None, 'shared'"):
        EntanglementCallback(weight_grad="ours")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="weight_grad"):
        attach(llama(), weight_grad="ours")  # type: ignore[arg-type]
