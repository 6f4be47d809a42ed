"""Runs of vision-language classes on text: measured is the class that was trained, with its own names of weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gradent import PairBatch, measure
from gradent.auditing.pair_tokens import audit_tokens
from gradent.auditing.state.config import TokenConfig
from gradent.errors import DataFileError
from gradent.loading.models import load_model
from gradent.loading.source import resolve_source
from gradent.planning.trace import inspect_model
from tests.auditing.made import write_jsonl
from tests.auditing.situations import (
    ROWS,
    SPLIT,
    adapted,
    assert_right,
    audited,
    measured,
    plain,
    right,
    same,
    train,
)
from tests.truth import TOLERANCE, scaled_error
from tests.vision_language import KINDS, load, make

LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
HERE = [kind for kind in KINDS if hasattr(transformers, kind)]


def run_of(kind, directory, **options):
    """A run of TRL's on a class, given as its users do, by the class's own object."""
    base = make(kind, directory / "base")
    return train(load(kind, base), directory, tokenizer=tokens(directory), **options)


def tokens(directory):
    return PreTrainedTokenizerFast.from_pretrained(directory / "base")


@pytest.mark.parametrize("kind", HERE)
def test_a_lora_run(kind, tmp_path) -> None:
    run = run_of(kind, tmp_path, peft=LORA)
    result = audited(tmp_path)
    tokenizer = tokens(tmp_path)
    for parameters in (policy := adapted(load(kind, tmp_path / "base"), run / "checkpoint-4")).named_parameters():
        parameters[1].requires_grad_("lora_" in parameters[0])
    assert_right(result, 4, policy, tokenizer)
    same(measured(result, 4, reference=True), plain(load(kind, tmp_path / "base"), tokenizer))
    traced = inspect_model(resolve_source(str(run / "checkpoint-4")))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {use.parameter for use in traced.uses} == trained


# transformers has a tokenizer of its own for Qwen 3.5, whatever is saved, and it does not know the words of this test.
@pytest.mark.parametrize("kind", [kind for kind in HERE if "Qwen3_5" not in kind])
def test_a_full_run(kind, tmp_path) -> None:
    run = run_of(kind, tmp_path, learning_rate=1e-3)
    result = audited(tmp_path, base=str(tmp_path / "base"))
    assert_right(result, 4, load(kind, run / "checkpoint-4"), tokens(tmp_path))
    assert_right(result, 0, load(kind, tmp_path / "base"), tokens(tmp_path))
    assert inspect_model(resolve_source(str(run / "checkpoint-4"))).name == kind


@pytest.mark.parametrize("kind", HERE)
def test_a_full_model_is_of_its_own_class(kind, tmp_path) -> None:
    loaded = load_model(resolve_source(str(make(kind, tmp_path / "base"))))
    assert type(loaded).__name__ == kind
    true = right(load(kind, tmp_path / "base"), tokens(tmp_path))
    batch = PairBatch.from_text(tokens(tmp_path), *SPLIT, add_eos=True)
    assert scaled_error(measure(loaded, batch), true) < TOLERANCE["float32"]


def test_one_pair_token_by_token(tmp_path) -> None:
    kind = HERE[0]
    base = make(kind, tmp_path / "base")
    options = {"data": str(write_jsonl(tmp_path / "pairs.jsonl", ROWS)), "quiet": True}
    found = audit_tokens(TokenConfig(model=str(base), out=tmp_path / "out", pair=0, **options))
    true = right(load(kind, base), tokens(tmp_path))
    for side, logps in (("chosen", true.chosen_logp), ("rejected", true.rejected_logp)):
        assert found.record[side]["logp"] == pytest.approx(float(logps[0]), rel=1e-5)
    assert torch.tensor(found.record["inner"]).sum().item() == pytest.approx(float(true.inner[0]), rel=1e-4)


@pytest.mark.skipif(not hasattr(transformers, "Qwen3_5Config"), reason="transformers 5 has it")
@pytest.mark.parametrize("kind", ["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"])
def test_of_two_classes_the_one_that_an_adapter_was_trained_on(kind, tmp_path) -> None:
    base = make("Qwen3_5ForConditionalGeneration", tmp_path / "base")
    model = load(kind, base) if "Conditional" in kind else AutoModelForCausalLM.from_pretrained(base)
    assert type(model).__name__ == kind
    run = train(model, tmp_path, tokenizer=tokens(tmp_path), peft=LORA)
    loaded = load_model(resolve_source(str(run / "checkpoint-4"), None))
    assert type(loaded.get_base_model()).__name__ == kind
    same(measured(audited(tmp_path), 4), plain(loaded, tokens(tmp_path)))


def test_a_row_with_images_is_refused_with_what_measures_it(tmp_path) -> None:
    make(HERE[0], tmp_path / "base")
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the film was"}]}]
    answers = {side: [{"role": "assistant", "content": "bright"}] for side in ("chosen", "rejected")}
    for row in ({**ROWS[0], "images": ["film.png"]}, {"prompt": said, **answers}):
        write_jsonl(tmp_path / "pairs.jsonl", [row])
        with pytest.raises(DataFileError, match="EntanglementCallback"):
            audited(tmp_path, tmp_path / "base", loss="simpo")


def test_a_chat_template_that_an_old_processor_saved(tmp_path) -> None:
    base = make(HERE[0], tmp_path / "base")
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (base / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    rows = [
        {side: [{"role": "user", "content": row[side].strip()}] for side in ("prompt", "chosen", "rejected")}
        for row in ROWS
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    result = audited(tmp_path, base, loss="simpo")
    assert result.summary["data"]["measured"] == len(rows)
    shutil.rmtree(tmp_path / "out")
