"""What an audit measures and holds against it: a model, a run's checkpoints, and the reference of either."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gradent import audit
from gradent.auditing.api import AuditResult
from gradent.auditing.state.config import AuditConfig
from gradent.auditing.state.targets import find_targets
from gradent.errors import InputError, ModelError
from gradent.record import read_pairs
from tests.auditing.made import PAIRS, logp, save_lora, write_jsonl


def run(model: Path, **options: Any) -> AuditResult:
    data = write_jsonl(model.parent / "pairs.jsonl", PAIRS)
    return audit(
        model, data, **{"out": model.parent / "out", "report": False, "quiet": True, "attribution": False, **options}
    )


def reference_logps(result: AuditResult) -> torch.Tensor:
    columns = read_pairs(result.pairs_path).to_pydict()
    return torch.tensor([columns["ref_chosen_logp"], columns["ref_rejected_logp"]], dtype=torch.float64)


def plain_logps(model: torch.nn.Module, tokenizer: Any) -> torch.Tensor:
    """Log-probs of both responses, one row at a time."""
    rows = []
    for side in ("chosen", "rejected"):
        encoded = [
            (tokenizer(pair["prompt"])["input_ids"], tokenizer(pair["prompt"] + pair[side])["input_ids"])
            for pair in PAIRS
        ]
        rows.append([logp(model, prompt, [*whole[len(prompt) :], tokenizer.eos_token_id]) for prompt, whole in encoded])
    return torch.tensor(rows, dtype=torch.float64)


KINDS = {
    "self": ({}, "own reference, as at the first step"),
    "adapter_off": ({"adapter": "adapter"}, "reference is the base .* without the adapter"),
    "model": ({"reference": "other"}, None),
    "model, under an adapter": ({"adapter": "adapter", "reference": "other"}, None),
    "model, itself an adapter": ({"reference": "adapter"}, None),
    "none": ({"loss": "simpo"}, None),
    "adapter_off, for other losses' sake": ({"adapter": "adapter", "loss": "simpo"}, "without the adapter"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_references(kind, local_model, tiny_llama, tiny_tokenizer, tmp_path) -> None:
    options, told = KINDS[kind]
    save_lora(tmp_path / "adapter", local_model)
    other = LlamaForCausalLM(tiny_llama.config).eval()
    other.save_pretrained(tmp_path / "other")
    paths = {name: each if name == "loss" else str(tmp_path / each) for name, each in options.items()}
    result = run(local_model, **paths)
    assert result.summary["reference"]["kind"] == kind.partition(",")[0]
    said = "\n".join(result.summary["notes"])
    assert ("--reference" in said) == (told is not None)
    assert re.search(told or "", said)
    if kind == "none":
        assert read_pairs(result.pairs_path)["ref_chosen_logp"].null_count == len(PAIRS)
        return
    base = AutoModelForCausalLM.from_pretrained(local_model)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = {"self": tiny_llama, "adapter_off": tiny_llama, "adapter_off, for other losses' sake": tiny_llama,
                "model, itself an adapter": adapted}.get(kind, other)  # fmt: skip
    found = reference_logps(result)
    torch.testing.assert_close(found, plain_logps(expected, tiny_tokenizer), rtol=1e-5, atol=1e-5)
    wrong = other if expected is not other else tiny_llama
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, plain_logps(wrong, tiny_tokenizer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_trained_biases_stay_in_the_reference_and_that_is_told(bias, local_model, tmp_path) -> None:
    result = run(local_model, adapter=save_lora(tmp_path / "adapter", local_model, bias=bias))
    assert any("pass --reference" in note for note in result.summary["notes"]) == (bias != "none")


def test_a_reference_with_another_vocabulary(local_model, tiny_tokenizer, tmp_path) -> None:
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **config)).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match=r"small: the tokenizer's vocabulary does not match"):
        run(local_model, reference=str(tmp_path / "small"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "somewhere"}, "is not a run .*Leave --base out"),
        ({"checkpoints": "last"}, "is not a run .*Leave --checkpoints out"),
        ({"checkpoints": [0, 3]}, "is not a run .*Leave --checkpoints out"),
    ],
)
def test_options_of_a_run_for_what_is_none(options, message, local_model) -> None:
    arguments = {"adapter": None, "base": None, "checkpoints": "all", **options}
    with pytest.raises(InputError, match=message):
        find_targets(AuditConfig(model=str(local_model), data="", out=Path(), **arguments))


def test_an_adapter_for_a_run(tmp_path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(InputError, match=r"is a run .*Leave --adapter out"):
        find_targets(AuditConfig(model=str(tmp_path), data="", out=Path(), adapter="other"))
