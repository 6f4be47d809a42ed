"""Runs on a quantized base: measured on that base, or refused with what can be measured instead, or doubted."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gradent.errors import InputError, ModelError
from gradent.loading.models import load_model
from gradent.loading.source import resolve_source
from tests.auditing.situations import LORA, ROWS, assert_right, audited, measured, plain, same, tokenizer_of, train
from tests.quantized import KINDS, dequantized, make_plain, quantize

ADAPTER = {**LORA, "target_modules": ["q_proj", "v_proj", "down_proj"]}
NAMES = {"nf4": "nf4", "fp4, twice": "fp4-double", "8 bit": "int8"}
HAS = {name: importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "torchao")}
needs_bitsandbytes = pytest.mark.skipif(not HAS["bitsandbytes"], reason="needs bitsandbytes")


def trained_on(kind, directory, *, saved):
    """A QLoRA run, on a base that was saved quantized or is quantized while it is loaded."""
    model = quantize(make_plain(directory / "base"), kind)
    if saved:
        model.save_pretrained(directory / "small")
        tokenizer_of(directory).save_pretrained(directory / "small")
        model = AutoModelForCausalLM.from_pretrained(directory / "small", dtype=torch.float32)
    return train(model, directory, peft=ADAPTER)


def policy_of(kind, directory, run):
    """The policy of step 4 with plain layers of the weights that its quantized ones stand for."""
    model = PeftModel.from_pretrained(
        quantize(directory / "base", kind), run / "checkpoint-4", is_trainable=True, autocast_adapter_dtype=True
    )
    return dequantized(model)


def check(result, kind, directory, run) -> None:
    assert_right(result, 4, policy_of(kind, directory, run), tokenizer_of(directory))
    reference = dequantized(quantize(directory / "base", kind))
    same(measured(result, 4, reference=True), plain(reference, tokenizer_of(directory)))
    assert result.summary["doubt"] is None


@needs_bitsandbytes
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_base_that_was_saved_quantized(kind, tmp_path) -> None:
    run = trained_on(kind, tmp_path, saved=True)
    check(audited(tmp_path), kind, tmp_path, run)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_base_that_was_quantized_while_it_was_loaded(kind, tmp_path) -> None:
    run = trained_on(kind, tmp_path, saved=False)
    check(audited(tmp_path, quantize=NAMES[kind]), kind, tmp_path, run)


def learn(base, tokenizer) -> None:
    """Train a model on the responses until it knows them, with weights of such sizes that 4 bits lose half an MLP."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    texts = [row["prompt"] + row[side] for row in ROWS for side in ("chosen", "rejected")]
    rows = tokenizer(texts, return_tensors="pt", padding=True)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(input_ids=rows["input_ids"], labels=labels).loss.backward()
        optimizer.step()
    with torch.no_grad():  # the same function
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::2] *= 100
            layer.mlp.down_proj.weight[:, ::2] /= 100
    model.save_pretrained(base)


@needs_bitsandbytes
def test_the_guard_knows_the_16_bit_base_of_a_quantized_run(tmp_path) -> None:
    base, tokenizer = make_plain(tmp_path / "base"), tokenizer_of(tmp_path)
    learn(base, tokenizer)
    train(quantize(base, "nf4"), tmp_path, peft=ADAPTER)
    doubt = audited(tmp_path).summary["doubt"]
    assert "--quantize nf4" in doubt
    assert audited(tmp_path, quantize="nf4", out=tmp_path / "right").summary["doubt"] is None


@needs_bitsandbytes
def test_quantized_weights_alone_have_no_gradient(tmp_path) -> None:
    model = quantize(make_plain(tmp_path / "base"), "nf4")
    model.save_pretrained(tmp_path / "small")
    with pytest.warns(UserWarning, match=r"quantized \(bitsandbytes in 4 bit \(nf4\)\).*--adapter DIR"):
        loaded = load_model(resolve_source(str(tmp_path / "small")))
    assert {name for name, each in loaded.named_parameters() if each.requires_grad} == {
        name for name, _ in loaded.named_parameters() if "norm" in name or "embed" in name or "lm_head" in name
    }


def test_torchao(tmp_path) -> None:
    if not HAS["torchao"]:
        pytest.skip("needs torchao")
    from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415
    from transformers import TorchAoConfig  # noqa: PLC0415

    base, config = make_plain(tmp_path / "base"), TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    run = train(model, tmp_path, peft=ADAPTER)
    result = audited(tmp_path, quantize="torchao-int8")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    policy = PeftModel.from_pretrained(model, run / "checkpoint-4", is_trainable=True)
    for module in policy.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            module.weight = torch.nn.Parameter(plain_weight(module.weight), requires_grad=False)
    assert_right(result, 4, policy, tokenizer_of(tmp_path))
    assert result.summary["doubt"] is None


def plain_weight(weight):
    return weight.dequantize() if hasattr(weight, "dequantize") else weight


@pytest.mark.skipif(HAS["bitsandbytes"], reason="is about a machine without bitsandbytes")
def test_without_the_library_the_16_bit_base_is_named(tmp_path) -> None:
    base = make_plain(tmp_path / "base")
    run = train(AutoModelForCausalLM.from_pretrained(base), tmp_path, peft=ADAPTER)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantized \(bitsandbytes in 4 bit \(nf4\)\).*--base DIR.*another function"):
        audited(tmp_path, loss="simpo")
    with pytest.raises(ModelError, match="gradent audit DIR --adapter"):
        audited(tmp_path, run / "checkpoint-4", loss="simpo")


def test_options_that_do_not_fit(tmp_path) -> None:
    base = make_plain(tmp_path / "base")
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(InputError, match="accepted: nf4, nf4-double"):
        audited(tmp_path, base, quantize="q4")
    with pytest.raises(InputError, match="float32 at most"):
        audited(tmp_path, base, quantize="nf4", dtype="float64")
    with pytest.raises(InputError, match="is a full model"):
        audited(tmp_path, base, quantize="nf4")
