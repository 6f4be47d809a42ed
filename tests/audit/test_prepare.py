"""What is decided before the first pair is measured: limits, EOS, the reference; and what the user is told of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradent import PairBatch
from gradent.audit import prepare as module
from gradent.audit.prepare import Prepared, prepare
from gradent.errors import DataFileError, InputError, ModelError
from gradent.measure import measure
from tests.audit.made import FORMATS, PAIRS, logp, save_lora, write_jsonl

DEFAULTS: dict[str, Any] = {
    "needs_reference": True,
    "adapter": None,
    "reference": None,
    "split": "train",
    "max_length": None,
    "max_pairs": None,
    "dtype": "float32",
    "device": "cpu",
    "skip_bad_rows": False,
    "add_eos": True,
    "trust_remote_code": False,
    "seed": 0,
}


def run(model: Path, rows: list[Any] = PAIRS, **options: Any) -> tuple[Prepared, str]:
    """What `prepare` returns for these rows, and what it tells."""
    told: list[str] = []
    data = write_jsonl(model.parent / "pairs.jsonl", rows)
    ready = prepare(str(model), data, tell=told.append, **{**DEFAULTS, **options})
    return ready, "\n".join(told)


def test_what_is_ready(local_model) -> None:
    ready, _ = run(local_model)
    assert [pair.row for pair in ready.pairs.pairs] == list(range(len(PAIRS)))
    assert (ready.rows, ready.step, ready.device, ready.add_eos) == (len(PAIRS), 0, "cpu", True)
    assert all(parameter.requires_grad for parameter in ready.model.parameters())


@pytest.mark.parametrize(("asked", "limit"), [(None, 128), (128, 128), (32, 32)])
def test_the_model_bounds_the_length(asked, limit, local_model) -> None:
    ready, told = run(local_model, max_length=asked, skip_bad_rows=True)
    assert ready.max_length == limit
    assert ("max_length is 128" in told) == (asked is None)
    assert all(pair.longest <= limit for pair in ready.pairs.pairs)


def test_a_model_with_room_gets_the_length_that_trl_takes(local_model) -> None:
    wide = LlamaConfig.from_pretrained(local_model)
    wide.max_position_embeddings = 4096
    wide.save_pretrained(local_model)
    ready, told = run(local_model)
    assert ready.max_length == 1024
    assert "max_length" not in told


@pytest.mark.parametrize(("asked", "message"), [(129, "has 128 positions. Pass --max-length 128"), (1, "2 at least")])
def test_a_length_that_cannot_be(asked, message, local_model) -> None:
    with pytest.raises(InputError, match=f"max_length is {asked}.*{message}"):
        run(local_model, max_length=asked)


@pytest.mark.parametrize("add_eos", [True, False])
def test_eos(add_eos, local_model) -> None:
    ready, _ = run(local_model, add_eos=add_eos)
    assert all((pair.chosen_ids[-1] == 2) == add_eos == (pair.rejected_ids[-1] == 2) for pair in ready.pairs.pairs)


def test_a_tokenizer_without_eos_is_told_of(local_model, tiny_tokenizer) -> None:
    tiny_tokenizer.eos_token = None
    tiny_tokenizer.save_pretrained(local_model)
    ready, told = run(local_model)
    assert "no EOS token" in told
    assert not ready.add_eos


def test_a_tokenizer_without_a_pad_token_changes_nothing(local_model, tiny_tokenizer) -> None:
    before, _ = run(local_model)
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(local_model)
    after, _ = run(local_model)
    assert after.pairs == before.pairs


def reference_logps(ready: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
    assert ready.reference is not None
    pairs = ready.pairs.pairs
    batch = PairBatch.from_tokens([(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs])
    return ready.reference(batch, measure(ready.model, batch))


def plain_logps(model: torch.nn.Module, ready: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = ready.pairs.pairs
    chosen = [logp(model, pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rejected = [logp(model, pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    return torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)


KINDS = {
    "self": ({}, "own reference, as at the first step"),
    "adapter_off": ({"adapter": "adapter"}, "reference is the base .* without the adapter"),
    "model": ({"reference": "other"}, None),
    "model, under an adapter": ({"adapter": "adapter", "reference": "other"}, None),
    "model, itself an adapter": ({"reference": "adapter"}, None),
    "none": ({"needs_reference": False}, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_references(kind, local_model, tiny_llama, tmp_path) -> None:
    options, told = KINDS[kind]
    save_lora(tmp_path / "adapter", local_model)
    other = LlamaForCausalLM(tiny_llama.config).eval()
    other.save_pretrained(tmp_path / "other")
    paths = {name: str(tmp_path / each) for name, each in options.items() if isinstance(each, str)}
    ready, said = run(local_model, **{**options, **paths})
    assert ready.reference_kind == kind.partition(",")[0]
    assert ("--reference" in said) == (told is not None)
    assert re.search(told or "", said)
    if kind == "none":
        assert ready.reference is None
        return
    adapted, _ = run(local_model, adapter=str(tmp_path / "adapter"))
    expected = {"self": tiny_llama, "adapter_off": tiny_llama, "model, itself an adapter": adapted.model}.get(
        kind, other
    )
    found = reference_logps(ready)
    torch.testing.assert_close(found, plain_logps(expected, ready), rtol=1e-5, atol=1e-5)
    wrong = other if expected is not other else tiny_llama
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, plain_logps(wrong, ready), rtol=1e-5, atol=1e-5)


def test_the_adapter_off_is_not_the_adapter_on(local_model, tmp_path) -> None:
    ready, _ = run(local_model, adapter=str(save_lora(tmp_path / "adapter", local_model)))
    on, off = plain_logps(ready.model, ready), reference_logps(ready)
    assert not torch.allclose(on[0], off[0], rtol=1e-3)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_trained_biases_stay_in_the_reference_and_that_is_told(bias, local_model, tmp_path) -> None:
    _, told = run(local_model, adapter=str(save_lora(tmp_path / "adapter", local_model, bias=bias)))
    assert ("pass --reference" in told) == (bias != "none")


def test_what_was_drawn_cut_and_skipped_is_told(local_model) -> None:
    _, told = run(
        local_model,
        [*PAIRS, {"prompt": "p"}, {"prompt": "q", "chosen": 300 * "y", "rejected": "n"}],
        skip_bad_rows=True,
    )
    assert "1 rows were skipped" in told
    assert "pairs.jsonl:8: missing" in told
    assert "1 of 16 responses were cut at max_length 128" in told
    _, told = run(local_model, max_pairs=2, seed=5)
    assert f"2 of {len(PAIRS)} rows are measured, drawn at random with seed 5" in told


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([PAIRS[0], {"prompt": "p"}], DataFileError, "pairs.jsonl:2: missing"),
        (FORMATS["messages"], InputError, "pairs.jsonl:1: .*no chat template"),
    ],
)
def test_rows_are_checked_before_a_model_is_read(rows, kind, message, local_model, tiny_tokenizer, monkeypatch) -> None:
    tiny_tokenizer.chat_template = None
    tiny_tokenizer.save_pretrained(local_model)
    for stale in local_model.glob("*.jinja"):
        stale.unlink()
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("the model was read first"))
    with pytest.raises(kind, match=message):
        run(local_model, rows)


@pytest.fixture
def small(tmp_path, tiny_tokenizer) -> Path:
    """A model whose embedding has 100 rows for a tokenizer of 259."""
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **config)).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_tokenizer_that_is_not_the_model_s(small) -> None:
    with pytest.raises(ModelError, match=r"small: the tokenizer's vocabulary does not match.*Use the tokenizer that"):
        run(small)


def test_a_reference_with_another_vocabulary(local_model, small) -> None:
    with pytest.raises(ModelError, match=r"small: the tokenizer's vocabulary does not match"):
        run(local_model, reference=str(small))


def test_a_token_that_the_model_does_not_have_names_its_row(local_model, tiny_tokenizer) -> None:
    tiny_tokenizer.add_tokens(["<new>"])
    tiny_tokenizer.save_pretrained(local_model)
    assert run(local_model)[0].rows == len(PAIRS)
    with pytest.raises(ModelError, match=r"pairs.jsonl:2: contains token '<new>' with id 259"):
        run(local_model, [PAIRS[0], {**PAIRS[1], "rejected": "a <new> soup"}])
