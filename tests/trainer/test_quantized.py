"""QLoRA in a trainer: entries of the quantized model itself, and a run that gradent's own passes leave as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback
from tests.quantized import KINDS, dequantized, quantize
from tests.trainer.runs import llama, make_trainer, preferences
from tests.truth import scaled_error, truth


def adapted(base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, config)
    for part in model.parameters():
        if part.requires_grad:  # as they are after TRL's cast, below
            part.data = part.data.bfloat16().float()
    return model


def run(model: nn.Module, tokenizer: Any, out: Path, callbacks: list[Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    settings = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    trainer = make_trainer("dpo", model, tokenizer, out, callbacks, options={"ref_model": llama(seed=3)}, **settings)
    for part in model.parameters():
        if part.requires_grad:  # TRL casts adapters on quantized bases to bfloat16
            part.data = part.data.float()
    trainer.train()
    logs = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return logs, {name: part.detach().clone() for name, part in model.named_parameters() if part.requires_grad}


OPTIONS: dict[str, dict[str, Any]] = {
    "read off": {}, "own passes": {"mode": "measure", "realised": True}, "probe": {"probe_data": preferences(2)},
}  # fmt: skip


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_bits_and_entries(kind: str, name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = OPTIONS[name]
    base = tmp_path / "base"
    llama(hidden_size=64, intermediate_size=128, initializer_range=0.05).save_pretrained(base)
    watched, alone = (adapted(quantize(base, kind)) for _ in range(2))
    true_model = dequantized(copy.deepcopy(watched))
    callback = EntanglementCallback(every=1, on_error="raise", **options)
    logs, weights = run(watched, tiny_tokenizer, tmp_path / "watched", [callback])
    expected_logs, expected = run(alone, tiny_tokenizer, tmp_path / "alone", [])
    assert logs == expected_logs
    assert all(torch.equal(weights[each], expected[each]) for each in expected)
    first = callback.records[0]
    assert first.source == ("measure" if "mode" in options else "piggyback")
    assert first.batch is not None
    limit = 5e-2 if kind == "8 bit" else 5e-6  # whose activations are rounded
    assert scaled_error(first.gram, truth(true_model, first.batch)) < limit


def test_int8_of_torchao(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415  (an extra)

    plain, base = (llama(hidden_size=64, intermediate_size=128) for _ in range(2))
    quantize_(base.model, Int8WeightOnlyConfig())
    with torch.no_grad():
        for name, module in base.model.named_modules():
            if isinstance(module, nn.Linear):
                plain.model.get_submodule(name).weight.copy_(module.weight.dequantize())
    watched, true_model = adapted(base), adapted(plain)
    callback = EntanglementCallback(every=1, on_error="raise")
    run(watched, tiny_tokenizer, tmp_path, [callback])
    first = callback.records[0]
    assert first.source == "piggyback"
    assert first.batch is not None
    assert scaled_error(first.gram, truth(true_model, first.batch)) < 5e-5  # its product rounds the other way
