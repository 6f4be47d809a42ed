"""Adapters in folders of their names, and weights under a wrapper's prefix or without a number in them."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gradent.errors import GradentError, ModelError
from gradent.loading.models import load_model
from gradent.loading.source import read_step, resolve_source
from tests.auditing.situations import (
    LORA,
    adapted,
    assert_right,
    audited,
    base_of,
    measured,
    plain,
    same,
    tokenizer_of,
    train,
    trained_adapter,
)

ADAPTER, FULL = "adapter_model.safetensors", "model.safetensors"


@pytest.fixture
def named(tmp_path):
    """A run that trains the adapter "policy" beside another one, with the base as TRL's reference."""
    trained_adapter(base_of(tmp_path), tmp_path / "sft")
    model = PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "sft", adapter_name="policy", is_trainable=True)
    model.load_adapter(tmp_path / "sft", "reference")
    return tmp_path, train(model, tmp_path, ref_model=base_of(tmp_path))


def test_adapters_in_folders_of_their_names(named) -> None:
    directory, run = named
    assert not (run / "checkpoint-4/adapter_config.json").exists()
    result = audited(directory)
    policy = PeftModel.from_pretrained(base_of(directory), run / "checkpoint-4/policy", is_trainable=True)
    assert_right(result, 4, policy, tokenizer_of(directory))
    same(measured(result, 4, reference=True), plain(base_of(directory), tokenizer_of(directory)))
    assert result.summary["doubt"] is None
    assert any("Beside the adapter lies" in note and "--reference" in note for note in result.summary["notes"])
    other = audited(directory, reference=str(run / "checkpoint-4/reference"), out=directory / "other")
    right = plain(adapted(base_of(directory), directory / "sft"), tokenizer_of(directory))
    same(measured(other, 4, reference=True), right)


@pytest.mark.parametrize("place", ["checkpoint-2", "checkpoint-2/policy"])
def test_the_step_of_an_adapter_is_that_of_the_checkpoint_above(place, named) -> None:
    directory, run = named
    source = resolve_source(str(run / place))
    assert read_step(source) == 2 and source.adapter == str(run / "checkpoint-2/policy")
    result = audited(directory, run / place)
    policy = adapted(base_of(directory), run / "checkpoint-2/policy")
    same(measured(result, 2), plain(policy, tokenizer_of(directory)))


def test_several_adapters_of_which_any_may_be_the_trained_one(named) -> None:
    directory, run = named
    for step in (2, 4):
        (run / f"checkpoint-{step}/reference").rename(run / f"checkpoint-{step}/other")
    with pytest.raises(ModelError, match=r"folders of their names \(other, policy\).*gradent audit .*checkpoint-4/"):
        audited(directory, checkpoints="4")


PREFIXES = ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."]


def rename(path, change) -> None:
    save_file({change(name): each for name, each in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", PREFIXES)
def test_full_models_under_a_wrappers_prefix(prefix, tmp_path) -> None:
    base_of(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "wrapped")
    rename(tmp_path / "wrapped" / FULL, lambda name: prefix + name)
    with pytest.warns(UserWarning, match="wrapper's prefix .* the rest fits"):
        model = load_model(resolve_source(str(tmp_path / "wrapped")))
    for name, parameter in base_of(tmp_path).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_a_full_model_with_more_than_a_prefix_too_much(tmp_path) -> None:
    base_of(tmp_path)
    path = tmp_path / "base" / FULL
    weights = {f"module.{name}": each for name, each in load_file(path).items()}
    save_file({**weights, "v_head.weight": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"wrapper's prefix .* no place for v_head\.weight"):
        load_model(resolve_source(str(tmp_path / "base")))


@pytest.mark.parametrize("prefix", [*PREFIXES[:2], PREFIXES[3], "base_model.model."])
def test_adapters_under_a_wrappers_prefix(prefix, tmp_path) -> None:
    run = train(base_of(tmp_path), tmp_path, peft=LORA)
    right = plain(adapted(base_of(tmp_path), run / "checkpoint-4"), tokenizer_of(tmp_path))
    start = "base_model.model."
    for step in (2, 4):
        rename(run / f"checkpoint-{step}" / ADAPTER, lambda name: name.replace(start, start + prefix, 1))
    result = audited(tmp_path)
    same(measured(result, 4), right)
    assert any("wrapper's prefix" in note for note in result.summary["notes"])


def empty(path, how) -> None:
    weights = {} if how == "none" else {name: torch.zeros(0) for name in load_file(path)}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["none", "of size 0"])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_empty_weights_are_told_from_the_header(how, kind, tmp_path, monkeypatch) -> None:
    run = train(base_of(tmp_path), tmp_path, peft=LORA if kind == "adapter" else None)
    name = ADAPTER if kind == "adapter" else FULL
    empty(run / "checkpoint-4" / name, how)
    loads = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loads.append(1))
    held = "there are no weights in it" if how == "none" else r"\d+ of its \d+ weights are empty"
    for model in (None, run / "checkpoint-4"):
        with pytest.raises(GradentError, match=f"{held}, as DeepSpeed ZeRO-3.*stage3_gather_16bit"):
            audited(tmp_path, model, loss="simpo", **({} if model else {"checkpoints": "4"}))
    (run / "checkpoint-4/global_step4").mkdir()
    command = f"deepspeed.utils.zero_to_fp32 {re.escape(str(run / 'checkpoint-4'))}"
    with pytest.raises(GradentError, match=command):
        audited(tmp_path, loss="simpo", checkpoints="4")
    assert not loads


def test_sharded_safetensors_and_a_tied_head_that_is_not_on_disk(tmp_path) -> None:
    model = base_of(tmp_path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    (tmp_path / "base" / FULL).unlink(missing_ok=True)
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and "lm_head.weight" not in index["weight_map"]
    run = train(base_of(tmp_path), tmp_path, learning_rate=1e-3)
    result = audited(tmp_path, base=str(tmp_path / "base"))
    trained = AutoModelForCausalLM.from_pretrained(run / "checkpoint-4", dtype=torch.float32)
    assert_right(result, 4, trained, tokenizer_of(tmp_path))
    assert_right(result, 0, base_of(tmp_path), tokenizer_of(tmp_path))
