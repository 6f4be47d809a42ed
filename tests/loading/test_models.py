"""Models, adapters and tokenizers from disk: what is loaded is what was saved, or an error says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from gradent.errors import DataFileError, InputError, ModelError, NotCausalError
from gradent.loading.models import check_vocabulary, load_config, load_model, load_tokenizer
from gradent.loading.source import ModelSource, read_step, resolve_source
from tests.auditing.made import save_lora

TINY = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def full(path: Path) -> ModelSource:
    return ModelSource(base=str(path), adapter=None, name=str(path))


def drop_weight(path: Path, ending: str) -> None:
    """Take one tensor out of a safetensors file."""
    weights = load_file(path)
    (name,) = [name for name in weights if name.endswith(ending)]
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


def test_a_full_model_is_all_trainable_in_float32_and_in_evaluation_mode(local_model, tiny_llama) -> None:
    model = load_model(full(local_model))
    assert not model.training
    for name, parameter in tiny_llama.named_parameters():
        loaded = model.get_parameter(name)
        assert loaded.requires_grad and loaded.dtype == torch.float32
        assert torch.equal(loaded, parameter)


@pytest.mark.parametrize(
    ("dtype", "loaded"), [("float64", torch.float64), ("bfloat16", torch.bfloat16), ("auto", torch.float16)]
)
def test_dtypes(dtype, loaded, local_model, tiny_llama) -> None:
    tiny_llama.half().save_pretrained(local_model)
    assert {parameter.dtype for parameter in load_model(full(local_model), dtype=dtype).parameters()} == {loaded}


def test_a_reference_has_nothing_trainable(local_model) -> None:
    assert not any(parameter.requires_grad for parameter in load_model(full(local_model), trainable=False).parameters())


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_is_what_is_trainable(fields, local_model, tmp_path) -> None:
    adapter = save_lora(tmp_path / "adapter", local_model, **fields)
    model = load_model(resolve_source(str(local_model), str(adapter)))
    saved = load_file(adapter / "adapter_model.safetensors").values()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(each.double().sum().item() for each in trained) == sorted(
        each.double().sum().item() for each in saved
    )


def test_an_adapter_finds_its_base(local_model, tmp_path) -> None:
    adapter = save_lora(tmp_path / "adapter", local_model)
    source = resolve_source(str(adapter))
    assert (source.base, source.adapter, source.name) == (str(local_model), str(adapter), str(adapter))
    both = resolve_source(str(local_model), str(adapter))
    assert both == source
    assert resolve_source(str(local_model)) == full(local_model)


@pytest.mark.parametrize(("base", "message"), [(None, "names no base model"), ("gone/for/good", "does not exist here")])
def test_an_adapter_whose_base_is_lost(base, message, local_model, tmp_path) -> None:
    adapter = save_lora(tmp_path / "adapter", local_model)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    with pytest.raises(ModelError, match=f"{message}.*Run: gradent audit BASE --adapter {adapter}"):
        resolve_source(str(adapter))


def test_an_adapter_on_an_adapter(local_model, tmp_path) -> None:
    adapter = str(save_lora(tmp_path / "adapter", local_model))
    with pytest.raises(InputError, match=r"is itself a PEFT adapter.*or merge the first"):
        resolve_source(adapter, adapter)


def test_a_model_in_place_of_an_adapter(local_model) -> None:
    with pytest.raises(InputError, match=r"not a PEFT adapter.*Check --adapter"):
        resolve_source(str(local_model), str(local_model))


def test_an_adapter_for_another_base(local_model, tiny_gpt2, tmp_path) -> None:
    adapter = save_lora(tmp_path / "adapter", local_model)
    tiny_gpt2.float().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"cannot be put on .*Is it an adapter for this base"):
        load_model(resolve_source(str(tmp_path / "gpt2"), str(adapter)))


def test_an_adapter_that_lacks_a_weight(local_model, tmp_path) -> None:
    adapter = save_lora(tmp_path / "adapter", local_model)
    drop_weight(adapter / "adapter_model.safetensors", "layers.1.mlp.down_proj.lora_B.weight")
    with pytest.raises(ModelError, match=r"lacks weights.*layers\.1\.mlp\.down_proj\.lora_B.*initial values"):
        load_model(resolve_source(str(local_model), str(adapter)))


def test_a_prompt_learning_adapter_can_be_a_reference_but_not_be_measured(local_model, tiny_llama, tmp_path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(tiny_llama, config).save_pretrained(tmp_path / "adapter")
    source = resolve_source(str(local_model), str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match=r"PROMPT_TUNING adapters.*call gradent.measure"):
        load_model(source)
    assert load_model(source, trainable=False).num_parameters() > 0


def test_a_checkpoint_that_lacks_a_weight(local_model) -> None:
    drop_weight(local_model / "model.safetensors", "layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"lacks weights.*layers\.1\.mlp\.up_proj.*random numbers"):
        load_model(full(local_model))


def test_a_checkpoint_with_a_weight_of_another_shape(local_model) -> None:
    config = json.loads((local_model / "config.json").read_text())
    (local_model / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(ModelError, match=r"mlp\.down_proj\.weight \(saved \[16, 24\], needed \[16, 32\]\)"):
        load_model(full(local_model))


NOT_CAUSAL = {
    "an encoder with its head": (
        lambda: BertForMaskedLM(BertConfig(initializer_range=0.5, **TINY)),
        NotCausalError,
        "not causal.*decoder",
    ),
    "an encoder alone": (lambda: BertModel(BertConfig(**TINY)), ModelError, "lacks weights.*an encoder"),
    "a classifier": (lambda: LlamaForSequenceClassification(LlamaConfig(**TINY)), ModelError, "lm_head.*a classifier"),
    "an encoder-decoder": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=24, num_layers=1)),
        NotCausalError,
        "encoder-decoder.*measures causal",
    ),
}


@pytest.mark.parametrize("what", NOT_CAUSAL)
def test_models_that_are_no_causal_lm(what, tmp_path) -> None:
    build, kind, message = NOT_CAUSAL[what]
    build().save_pretrained(tmp_path / "other")
    with pytest.raises(kind, match=f"other: .*{message}"):
        load_model(full(tmp_path / "other"))


def test_a_model_that_transformers_knows_no_causal_lm_of(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotCausalError, match=r"no causal LM for ViTConfig"):
        load_model(full(tmp_path))


def test_pickled_weights_are_not_read(local_model, tiny_llama) -> None:
    (local_model / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), local_model / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"only pickled weights \(pytorch_model.bin\).*use_safetensors=False"
    ) as caught:
        resolve_source(str(local_model))
    remedy = str(caught.value).split("convert it once: ")[1]
    exec(remedy, {"AutoModelForCausalLM": AutoModelForCausalLM})
    assert resolve_source(str(local_model)) == full(local_model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./gone", "no such directory"),
        ("a/b/c", "no such directory"),
        ("my-model/config.json", "is a file; give the dir"),
    ],
)
def test_a_model_that_is_not_there(name, message, local_model, monkeypatch) -> None:
    monkeypatch.chdir(local_model.parent)
    with pytest.raises(InputError, match=f"^{name}: .*{message}"):
        resolve_source(name)


@pytest.mark.parametrize("name", ["my-modle", "owner/my-model"])
def test_a_model_that_the_hub_cannot_give(name, local_model, monkeypatch) -> None:
    monkeypatch.chdir(local_model.parent)
    with pytest.raises(ModelError, match=f"^{name}: .*no such directory here; if it is a hub id, check it"):
        load_config(resolve_source(name).base)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_config(content, local_model) -> None:
    (local_model / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"my-model: the model cannot be loaded"):
        load_config(str(local_model))


def test_damaged_weights(local_model) -> None:
    weights = local_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"has \d+ bytes, and \d+ by its own header"):
        load_model(full(local_model))


def test_a_directory_without_weights(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"no weights in it"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; accepted: float32"),
        ({"device": "cuda:99"}, "cannot be used here.*--device cpu"),
        ({"device": "meta"}, "cannot be used here.*--device cpu"),
        ({"device": "the moon"}, "cannot be used here.*--device cpu"),
    ],
)
def test_options_that_do_not_exist(options, message, local_model) -> None:
    with pytest.raises(InputError, match=message):
        load_model(full(local_model), **options)


def test_the_tokenizer_of_the_adapter_comes_first(local_model, tiny_tokenizer, tmp_path) -> None:
    adapter = save_lora(tmp_path / "adapter", local_model)
    source = resolve_source(str(local_model), str(adapter))
    assert load_tokenizer(source).chat_template == tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = "{{ messages[0].content }}"
    tiny_tokenizer.save_pretrained(adapter)
    assert load_tokenizer(source).chat_template == "{{ messages[0].content }}"


def test_a_model_without_a_tokenizer(local_model) -> None:
    for path in (*local_model.glob("*token*"), *local_model.glob("*.jinja")):
        path.unlink()
    with pytest.raises(ModelError, match=r"its tokenizer cannot be loaded.*tokenizer.save_pretrained"):
        load_tokenizer(full(local_model))


def test_vocabularies(tiny_tokenizer) -> None:
    check_vocabulary(tiny_tokenizer, 259, "m")
    with pytest.raises(ModelError, match=r"^m: .*ids go up to 258.*has 200 rows \(0 to 199\).*was trained with"):
        check_vocabulary(tiny_tokenizer, 200, "m")
    tiny_tokenizer.add_special_tokens({"pad_token": "<new>"})
    check_vocabulary(tiny_tokenizer, 259, "m", (258, "pairs.jsonl:1"))
    with pytest.raises(ModelError, match=r"^pairs.jsonl:7: contains token '<new>' with id 259.*resize"):
        check_vocabulary(tiny_tokenizer, 259, "m", (259, "pairs.jsonl:7"))


def test_the_step_of_a_checkpoint(local_model, tmp_path) -> None:
    assert read_step(full(local_model)) == 0
    state = local_model / "trainer_state.json"
    state.write_text('{"global_step": 30}')
    assert read_step(full(local_model)) == 30
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(state, adapter)
    (adapter / "trainer_state.json").write_text('{"global_step": 7}')
    assert read_step(ModelSource(base=str(local_model), adapter=str(adapter), name="a")) == 7
    for content in ("{", "[]", '{"global_step": null}'):
        state.write_text(content)
        with pytest.raises(DataFileError, match=r"trainer_state.json: "):
            read_step(full(local_model))
