"""What is decided before the first pair is measured: limits, EOS, the reference; and what the user is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from gradent.errors import DataFileError, InputError, ModelError
from gradent.loading import prepare as module
from gradent.loading.config import LoadConfig
from gradent.loading.prepare import Prepared, prepare
from tests.auditing.made import FORMATS, PAIRS, write_jsonl

DEFAULTS: dict[str, Any] = {
    "adapter": None,
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
    config = LoadConfig(model=str(model), data=str(data), **{**DEFAULTS, **options})
    ready = prepare(config, told.append)
    return ready, "\n".join(told)


def test_what_is_ready(local_model) -> None:
    ready, _ = run(local_model)
    assert [pair.row for pair in ready.material.pairs.pairs] == list(range(len(PAIRS)))
    assert (ready.material.rows, ready.step, ready.device, ready.material.add_eos) == (len(PAIRS), 0, "cpu", True)
    assert all(parameter.requires_grad for parameter in ready.model.parameters())


@pytest.mark.parametrize(("asked", "limit"), [(None, 128), (128, 128), (32, 32)])
def test_the_model_bounds_the_length(asked, limit, local_model) -> None:
    ready, told = run(local_model, max_length=asked, skip_bad_rows=True)
    assert ready.material.max_length == limit
    assert ("max_length is 128" in told) == (asked is None)
    assert all(pair.longest <= limit for pair in ready.material.pairs.pairs)


def test_a_model_with_room_gets_the_length_that_trl_takes(local_model) -> None:
    wide = LlamaConfig.from_pretrained(local_model)
    wide.max_position_embeddings = 4096
    wide.save_pretrained(local_model)
    ready, told = run(local_model)
    assert ready.material.max_length == 1024
    assert "max_length" not in told


@pytest.mark.parametrize(("asked", "message"), [(129, "has 128 positions. Pass --max-length 128"), (1, "2 at least")])
def test_a_length_that_cannot_be(asked, message, local_model) -> None:
    with pytest.raises(InputError, match=f"max_length is {asked}.*{message}"):
        run(local_model, max_length=asked)


@pytest.mark.parametrize("add_eos", [True, False])
def test_eos(add_eos, local_model) -> None:
    ready, _ = run(local_model, add_eos=add_eos)
    assert all(
        (pair.chosen_ids[-1] == 2) == add_eos == (pair.rejected_ids[-1] == 2) for pair in ready.material.pairs.pairs
    )


def test_a_tokenizer_without_eos_is_told_of(local_model, tiny_tokenizer) -> None:
    tiny_tokenizer.eos_token = None
    tiny_tokenizer.save_pretrained(local_model)
    ready, told = run(local_model)
    assert "no EOS token" in told
    assert not ready.material.add_eos


def test_a_tokenizer_without_a_pad_token_changes_nothing(local_model, tiny_tokenizer) -> None:
    before, _ = run(local_model)
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(local_model)
    after, _ = run(local_model)
    assert after.material.pairs == before.material.pairs


def test_what_was_drawn_cut_and_skipped_is_told(local_model) -> None:
    _, told = run(
        local_model,
        [*PAIRS, {"prompt": "p"}, {"prompt": "q", "chosen": 300 * "y", "rejected": "n"}],
        skip_bad_rows=True,
    )
    assert "1 rows were skipped" in told
    assert "pairs.jsonl:8: missing" in told
    assert "1 of 16 rows lost their end to max_length 128, as in TRL with truncation_mode='keep_start'" in told
    _, told = run(local_model, max_pairs=2, seed=5)
    assert f"2 of {len(PAIRS)} rows are measured" in told and "drawn with seed 5 (--max-pairs all for all)" in told


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


def test_a_token_that_the_model_does_not_have_names_its_row(local_model, tiny_tokenizer) -> None:
    tiny_tokenizer.add_tokens(["<new>"])
    tiny_tokenizer.save_pretrained(local_model)
    assert run(local_model)[0].material.rows == len(PAIRS)
    with pytest.raises(ModelError, match=r"pairs.jsonl:2: contains token '<new>' with id 259"):
        run(local_model, [PAIRS[0], {**PAIRS[1], "rejected": "a <new> soup"}])
