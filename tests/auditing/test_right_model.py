"""Situations in which another model than the one that its files name was trained: measured is the one that was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel

from gradent.errors import ModelError
from tests.auditing.situations import (
    LORA,
    ROWS,
    adapted,
    audited,
    base_of,
    measured,
    plain,
    same,
    tokenizer_of,
    train,
    trained_adapter,
)


@pytest.fixture
def on_adapter(tmp_path):
    """A run that trains an adapter further, of which TRL keeps a frozen copy named "ref"."""
    trained_adapter(base_of(tmp_path), tmp_path / "sft")
    model = PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "sft", is_trainable=True)
    return tmp_path, train(model, tmp_path)


def test_the_reference_of_an_adapter_that_is_trained_further(on_adapter) -> None:
    directory, run = on_adapter
    result = audited(directory)
    right = plain(adapted(base_of(directory), directory / "sft"), tokenizer_of(directory))
    assert (right - plain(base_of(directory), tokenizer_of(directory))).abs().mean() > 0.5
    for step in (2, 4):
        same(measured(result, step, reference=True), right)
        policy = adapted(base_of(directory), run / f"checkpoint-{step}")
        same(measured(result, step), plain(policy, tokenizer_of(directory)))
    assert result.summary["reference"] == {"kind": "model", "source": str(run / "checkpoint-2/ref")}
    alone = audited(directory, run / "checkpoint-4", out=directory / "alone")
    same(measured(alone, 4, reference=True), right)
    assert any("kept frozen" in note for note in alone.summary["notes"])


def test_a_frozen_reference_that_leads_out_of_the_run(on_adapter) -> None:
    directory, run = on_adapter
    for step in (2, 4):
        (run / f"checkpoint-{step}/ref").rename(directory / f"elsewhere-{step}")
        (run / f"checkpoint-{step}/ref").symlink_to(directory / f"elsewhere-{step}")
    with pytest.raises(ModelError, match=r"'ref' is a link that leads out of the run"):
        audited(directory)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_reference_of_an_adapter_that_changes_its_base(start, tmp_path) -> None:
    run = train(base_of(tmp_path), tmp_path, peft={**LORA, "lora_alpha": 4, "init_lora_weights": start})
    result = audited(tmp_path)
    model, tokenizer = adapted(base_of(tmp_path), run / "checkpoint-4"), tokenizer_of(tmp_path)
    same(measured(result, 4), plain(model, tokenizer))
    with model.disable_adapter():
        right = plain(model, tokenizer)
    same(measured(result, 4, reference=True), right)
    assert (right - plain(base_of(tmp_path), tokenizer)).abs().max() > 1e-3
    log = json.loads((run / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    implied = [entry["logps/chosen"] - entry["rewards/chosen"] / 0.1 for entry in log]
    assert measured(result, 4, reference=True)[0].mean().item() == pytest.approx(sum(implied) / 4, abs=2e-3)


@pytest.mark.parametrize("start", ["corda", "loftq"])
def test_an_adapter_whose_changed_base_cannot_be_made_again(start, tmp_path) -> None:
    if start == "loftq" and torch.cuda.is_available():
        pytest.skip("PEFT makes it again on a GPU")
    run = train(base_of(tmp_path), tmp_path, peft=LORA)
    for step in (2, 4):
        path = run / f"checkpoint-{step}/adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    with pytest.raises(ModelError, match=rf"started by init_lora_weights='{start}'.*gradent audit \.\.\. --base DIR"):
        audited(tmp_path, loss="simpo")


@pytest.mark.parametrize("padded", [0, 8])
def test_a_base_with_other_rows_of_embeddings(padded, tmp_path) -> None:
    model, tokenizer = base_of(tmp_path), tokenizer_of(tmp_path)
    if padded:
        model.resize_token_embeddings(len(tokenizer) + padded)
        model.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<one>", "<two>"])
    pairs = [{**row, "chosen": " <one>" + row["chosen"], "rejected": " <two>" + row["rejected"]} for row in ROWS]
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    start = copy.deepcopy(model)
    run = train(model, tmp_path, rows=pairs, tokenizer=tokenizer, peft=LORA)
    result = audited(tmp_path)
    same(measured(result, 4, reference=True), plain(start, tokenizer, pairs))
    same(measured(result, 4), plain(adapted(start, run / "checkpoint-4"), tokenizer, pairs))
