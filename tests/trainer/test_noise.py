"""An own pass beside dropout or NEFTune: the log says that it sees another function, also where log-probs agree."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback
from gradent.model.inputs import find_noise
from tests.trainer.runs import llama, make_trainer

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "LoRA's dropout at its first step": ({"lora": 0.5}, {}, "dropout"),
    "attention's dropout, tokens weighed": ({"attention_dropout": 0.3}, {"ld_alpha": 0.5}, "dropout"),
    "NEFTune": ({}, {"neftune_noise_alpha": 5.0}, "NEFTune's noise"),
    "NEFTune, tokens weighed": ({}, {"neftune_noise_alpha": 5.0, "ld_alpha": 0.5}, "NEFTune's noise"),
    "none": ({}, {}, None),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_noise_is_named(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, arguments, noise = SETTINGS[name]
    lora = made.pop("lora", None) if "lora" in made else None
    model = llama(**made)
    if lora is not None:
        targets = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=lora, task_type="CAUSAL_LM")
        model = get_peft_model(model, targets)
    mode: Any = "auto" if "ld_alpha" in arguments else "measure"
    callback = EntanglementCallback(every=1, mode=mode, on_error="raise")
    settings = {"max_steps": 1, "learning_rate": 0.0, "disable_dropout": False, **arguments}
    trainer = make_trainer("dpo", model, tiny_tokenizer, tmp_path, [callback], **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert callback.records[0].source == "measure"
    told = [entry.message for entry in caplog.records if "sees other log-probs" in entry.message]
    assert len(told) == (noise is not None)
    assert noise is None or f"which has {noise}: the entries are those of the model without" in told[0]
    assert noise is None or "as exact" not in caplog.text


def test_noise_of_training_alone() -> None:
    model = llama(attention_dropout=0.1)
    assert find_noise(model.train()) == ["dropout"]
    assert find_noise(model.eval()) == find_noise(llama().train()) == []
